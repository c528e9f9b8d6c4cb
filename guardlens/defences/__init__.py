"""Defences, one paper per module. A defence is a change of the prompt and an intervention; either may be empty."""

from guardlens.defences._self_reminder import reminder, self_reminder
from guardlens.defences._vlm_guard import Reading, vlm_guard
from guardlens.defences.base import Defence, none

__all__ = ["Defence", "Reading", "none", "reminder", "self_reminder", "vlm_guard"]
