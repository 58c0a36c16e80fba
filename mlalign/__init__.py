"""mlalign: fine-tune an LLM on a task and align its middle layer across languages, in one run.

Command line: `mlalign --help`. The method is on one screen in `mlalign/objectives.py`.
"""

__version__ = "0.1.0"
