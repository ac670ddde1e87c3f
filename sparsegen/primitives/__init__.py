"""Give each verb one file: node, typing rule, reference, cost."""

from sparsegen.primitives.attend import Attend, Source, attend
from sparsegen.primitives.cat import Cat, cat
from sparsegen.primitives.compress import Compress, compress
from sparsegen.primitives.merge import Merge, merge
from sparsegen.primitives.project import Project, project
from sparsegen.primitives.reduce import Reduce, reduce
from sparsegen.primitives.score import Score, score
from sparsegen.primitives.select import Select, select

__all__ = [
    "Attend", "Cat", "Compress", "Merge", "Project", "Reduce", "Score", "Select", "Source",
    "attend", "cat", "compress", "merge", "project", "reduce", "score", "select",
]  # fmt: skip
