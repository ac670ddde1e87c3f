"""See a window of recent keys and the first ones, with a learned sink in the denominator.

StreamingLLM (arXiv 2309.17453) keeps the first keys; gpt-oss learns a sink logit per head instead.
A sink of -inf has no effect.
"""

import sparsegen as sg
from sparsegen.patterns import Config


@sg.pattern
def sliding_window(
    q: sg.Tensor["T Hq D"],
    k: sg.Tensor["S Hk D"],
    v: sg.Tensor["S Hk E"],
    sink: sg.Tensor["Hq"],
    *,
    window=4096,
    first=4,
):
    """Attend to the last `window` and the `first` keys."""
    i, j = sg.index(q, k)
    return sg.attend(q, k, v, where=(j <= i) & ((i - j < window) | (j < first)), sink=sink)


CONFIGS = (
    Config(
        "gpt-oss-120b",
        {"T": 4096, "S": 4096, "Hq": 64, "Hk": 8, "D": 64, "E": 64},
        {"window": 128, "first": 0},
        "the windowed layers",
    ),
    Config(
        "mistral-7b",
        {"T": 8192, "S": 8192, "Hq": 32, "Hk": 8, "D": 128, "E": 128},
        {"window": 4096, "first": 0},
        "v0.1; its sinks are -inf",
    ),
    Config(
        "streaming-llm",
        {"T": 4096, "S": 4096, "Hq": 32, "Hk": 32, "D": 128, "E": 128},
        {"window": 1020, "first": 4},
        "Llama-2-7B; its sinks are -inf",
    ),
)
TEST_CONFIGS = (
    Config("odd", {"T": 23, "S": 23, "Hq": 6, "Hk": 2, "D": 5, "E": 7}, {"window": 7, "first": 3}),
    Config("chunk", {"T": 9, "S": 53, "Hq": 4, "Hk": 1, "D": 9, "E": 9}, {"window": 5, "first": 2}),
    Config("decode", {"T": 1, "S": 71, "Hq": 3, "Hk": 3, "D": 17, "E": 3}, {"window": 13}),
    Config(
        "no-first", {"T": 31, "S": 31, "Hq": 2, "Hk": 1, "D": 8, "E": 8}, {"window": 3, "first": 0}
    ),
    Config("window-beyond", {"T": 19, "S": 19, "Hq": 5, "Hk": 5, "D": 3, "E": 5}),
    Config(
        "past-tiles",
        {"T": 133, "S": 151, "Hq": 3, "Hk": 1, "D": 16, "E": 24},
        {"window": 37, "first": 5},
    ),
)
