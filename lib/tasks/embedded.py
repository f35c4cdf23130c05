"""Tasks made here by seeded generators: always there, offline."""

from lib.tasks import Task

TASKS: dict[str, Task] = {}
