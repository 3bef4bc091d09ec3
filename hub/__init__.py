"""Turns a distilled artifact into a folder fit to publish, and publishes it to the Hugging Face Hub.

Anything that is a valid artifact can be published: nothing here knows how it was made.
"""

from .folder import complete_folder
from .publish import PushPlan, plan_push, push

__all__ = ["PushPlan", "complete_folder", "plan_push", "push"]
