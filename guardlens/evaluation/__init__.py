"""Answers under defences, judged: attack success and over-refusal, with intervals."""
