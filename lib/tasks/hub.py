"""Tasks whose data comes from the Hugging Face Hub, or from a folder of files of the same schema."""

from lib.tasks import Task

TASKS: dict[str, Task] = {}
