"""See every key: bidirectional and cross attention."""

import sparsegen as sg
from sparsegen.patterns import Config


@sg.pattern
def full(q: sg.Tensor["T Hq D"], k: sg.Tensor["S Hk D"], v: sg.Tensor["S Hk E"]):
    """Attend to all keys."""
    return sg.attend(q, k, v)


CONFIGS = (
    Config("bert-large", {"T": 512, "S": 512, "Hq": 16, "Hk": 16, "D": 64, "E": 64}),
    Config(
        "whisper-large-cross",
        {"T": 448, "S": 1500, "Hq": 20, "Hk": 20, "D": 64, "E": 64},
        note="decoder text over encoded audio",
    ),
    Config("dit-xl", {"T": 4096, "S": 4096, "Hq": 16, "Hk": 16, "D": 72, "E": 72}),
)
TEST_CONFIGS = (
    Config("odd", {"T": 7, "S": 13, "Hq": 6, "Hk": 3, "D": 5, "E": 7}),
    Config("one-query", {"T": 1, "S": 37, "Hq": 3, "Hk": 1, "D": 17, "E": 3}),
    Config("one-key", {"T": 5, "S": 1, "Hq": 5, "Hk": 5, "D": 1, "E": 1}),
    Config("more-queries", {"T": 41, "S": 19, "Hq": 14, "Hk": 2, "D": 33, "E": 65}),
    Config("past-tiles", {"T": 67, "S": 131, "Hq": 3, "Hk": 3, "D": 24, "E": 40}),
)
