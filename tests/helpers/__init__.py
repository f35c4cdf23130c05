"""What several test files share:

golden data, a trained parrot, a stand-in for wandb, programs that tests start.
"""

from pathlib import Path

ROOT = Path(__file__).parents[2]
