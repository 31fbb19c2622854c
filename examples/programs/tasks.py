"""The tasks of the study, by name."""

from .expressions import EXPRESSIONS
from .programs import PROGRAMS
from .task import Task

TASKS: dict[str, Task] = {task.name: task for task in (PROGRAMS, EXPRESSIONS)}
