"""The tasks of the study, by name."""

from .expressions import EXPRESSIONS
from .programs import DEEP, PROGRAMS
from .task import Task

TASKS: dict[str, Task] = {task.name: task for task in (PROGRAMS, DEEP, EXPRESSIONS)}
