"""Turns a distilled artifact into a folder fit to publish, and publishes it to the Hugging Face Hub.

Anything that is a valid artifact can be published: nothing here knows how it was made.
"""

from .folder import complete_folder
from .plan import PushOptions, PushPlan, plan_push
from .publish import Pushed, check_access, push, push_folder

__all__ = [
    "PushOptions",
    "PushPlan",
    "Pushed",
    "check_access",
    "complete_folder",
    "plan_push",
    "push",
    "push_folder",
]
