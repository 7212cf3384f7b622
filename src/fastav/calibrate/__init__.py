"""Calibration: from a few clips to a plan, with the evidence for it.

Source: arXiv:2601.13143, section 3, whose fixed rules come from rollouts computed beforehand.
"""

from fastav.calibrate.answers import ANSWERS, AnswerPair, Comparison
from fastav.calibrate.calibration import Calibration, Failure
from fastav.calibrate.evidence import KINDS, TOP, Evidence, Moments, evidence_of
from fastav.calibrate.prompts import QUESTION, Prompt, prompts_of, read_questions
from fastav.calibrate.rule import Choice, Criterion, choose, start_layer
from fastav.calibrate.store import Preview, Record, Store

__all__ = [
    "ANSWERS",
    "KINDS",
    "QUESTION",
    "TOP",
    "AnswerPair",
    "Calibration",
    "Choice",
    "Comparison",
    "Criterion",
    "Evidence",
    "Failure",
    "Moments",
    "Preview",
    "Prompt",
    "Record",
    "Store",
    "choose",
    "evidence_of",
    "prompts_of",
    "read_questions",
    "start_layer",
]
