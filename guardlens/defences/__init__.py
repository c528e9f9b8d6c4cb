"""Defences, one paper per file. A defence is a prompt transform and an intervention; either may be empty."""

from guardlens.defences.protocol import Defence, none
from guardlens.defences.self_reminder import reminder, self_reminder
from guardlens.defences.vlm_guard import Reading, vlm_guard

__all__ = ["Defence", "Reading", "none", "reminder", "self_reminder", "vlm_guard"]
