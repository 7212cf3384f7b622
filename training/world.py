"""What the training must know of a world: its scenes, the labels of their tokens, its model and its recipe."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastav.models.videollama2 import Scheme, VideoLlama2Config

Labels = dict[str, Any]
"""Labels of the tokens of one clip, or of several, by what they say: arrays or tensors [..., tokens, ...]."""

IGNORED = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A phase of the decoder's training.

    asked: kinds of questions about every scene, to which the world adds others, among them `facts` random kinds.
    peak: highest learning rate, as a share of the full one. held: share of the steps before the rate falls. turns: the
    lengths of clips that steps use in turn, as indices of the world's lengths. aligned: weight of the loss by which the
    embedding of a token of a clip is near the words for what it shows.
    """

    steps: int
    asked: tuple[str, ...]
    facts: int
    peak: float | int
    held: float | int
    turns: tuple[int, ...] = (0,)
    aligned: float | int = 0


class World(ABC):
    """A world to train on, with its recipe.

    folder: of builds, in `build/`. lengths: of clips, in seconds; the usual one first. suffixes: of the names of their
    models. fps: of rendered pictures.
    banks, test_banks: pictures, and as many sounds, of each length. scenes, test_scenes: at once, for each length.
    video_steps, audio_steps: of the encoders. sounds: at once, in a step of the audio encoder, for each length.
    heads: what video tokens are labelled with, and how many labels there are.
    phases: of the decoder. weights: of kinds of questions in the loss, where they are not one.
    noise: standard deviation of what is added to features in training, as a share of theirs.
    interleaved: whether some steps have the sound between the pairs of frames, instead of after them.
    matching: whether attention starts as a match of like tokens; see `untrained`.
    align_words: the words that `described` knows; none if no phase aligns tokens with words.
    """

    folder: ClassVar[str]
    lengths: ClassVar[tuple[int, ...]]
    suffixes: ClassVar[tuple[str, ...]]
    fps: ClassVar[int]
    banks: ClassVar[tuple[int, ...]]
    test_banks: ClassVar[tuple[int, ...]]
    scenes: ClassVar[tuple[int, ...]]
    test_scenes: ClassVar[tuple[int, ...]]
    video_steps: ClassVar[int]
    audio_steps: ClassVar[int]
    sounds: ClassVar[tuple[int, ...]]
    heads: ClassVar[Mapping[str, int]]
    phases: ClassVar[tuple[Phase, ...]]
    weights: ClassVar[Mapping[str, float]] = {}
    noise: ClassVar[float] = 0.0
    interleaved: ClassVar[bool] = False
    matching: ClassVar[bool] = False
    align_words: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def sentences(self) -> Iterator[str]:
        """Sentences that contain every word."""

    @abstractmethod
    def configuration(self, words: PreTrainedTokenizerBase) -> VideoLlama2Config:
        """The configuration of the model for the usual clips."""

    @abstractmethod
    def picture(self, rng: np.random.Generator, seconds: int, *, held_out: bool) -> Any:
        """A random picture, if possible of this split."""

    @abstractmethod
    def sound(self, rng: np.random.Generator, seconds: int, *, held_out: bool) -> Any:
        """A random sound, if possible of this split."""

    @abstractmethod
    def pairs(
        self, pictures: Sequence[Any], sounds: Sequence[Any], count: int, rng: np.random.Generator, *, held_out: bool
    ) -> list[tuple[int, int]]:
        """Draw scenes of one split, as indices of picture and sound."""

    @abstractmethod
    def frames(self, picture: Any, which: Int[np.ndarray, " picked"]) -> UInt8[np.ndarray, "picked side side 3"]:
        """The frames of a picture with these numbers."""

    @abstractmethod
    def waveform(self, sound: Any) -> Float[np.ndarray, " samples"]:
        """The samples of a sound at 16 kHz."""

    @abstractmethod
    def seen(self, picture: Any, moments: Float[np.ndarray, " frames"], scheme: Scheme) -> Labels:
        """Labels of the video tokens of a picture.  moments: the second of each sampled frame."""

    @abstractmethod
    def heard(self, sound: Any, scheme: Scheme) -> Labels:
        """Labels of the audio tokens of a sound."""

    @abstractmethod
    def video_loss(self, logits: Mapping[str, Tensor], labels: Labels) -> Tensor:
        """The loss of the video encoder.  logits: of each head, [videos, tokens, labels]."""

    @abstractmethod
    def audio_loss(self, said: Float[Tensor, "sounds tokens classes"], labels: Labels) -> Tensor:
        """The loss of the audio encoder.  said: by the predictor of BEATs."""

    @abstractmethod
    def readings(
        self, logits: Mapping[str, Tensor], seen: Labels, said: Tensor, heard: Labels
    ) -> Iterator[tuple[str, float]]:
        """The share of right labels, by what they say; arguments as of the two losses."""

    @abstractmethod
    def kinds(self, phase: Phase, rng: np.random.Generator, seconds: int) -> list[str]:
        """Draw the kinds of questions about one scene."""

    @abstractmethod
    def all_kinds(self, seconds: int) -> list[str]:
        """All kinds of questions about clips of this length."""

    @abstractmethod
    def ask(self, kind: str, picture: Any, sound: Any, rng: np.random.Generator) -> Any:
        """A question (`kind`, `text`, `answer`) about a scene; None if it allows none of this kind."""

    def groups(self, question: Any) -> tuple[str, ...]:
        """The groups in which an answer counts when the training is evaluated."""
        return (question.kind,)

    def described(self, seen: Labels, heard: Labels) -> tuple[Tensor, Tensor] | None:
        """The words for what tokens show, as numbers in `align_words`: two bool tensors [..., tokens, words].

        None in a world without such words.
        """
        return None


def configuration_of(
    words: PreTrainedTokenizerBase,
    *,
    width: int,
    mlp: int,
    heads: int,
    positions: int,
    seconds: int,
    frames: int,
    picture: Mapping[str, int],
    sound: Mapping[str, int],
) -> VideoLlama2Config:
    """The configuration of a small model with 12 layers.

    width, mlp, heads, positions: of the decoder. seconds, frames: of a clip. picture, sound: settings of the encoders.
    """
    return VideoLlama2Config(
        vocab_size=len(words) + 2,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=12,
        num_attention_heads=heads,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        mm_vision_tower=f"siglip-tiny-patch{picture['patch_size']}",
        mm_vision_select_layer=-1,
        mm_hidden_size=picture["hidden_size"],
        mm_audio_tower=None,
        mm_hidden_size_a=128,
        hidden_size_a=width,
        num_frames=frames,
        vision_config={**picture, "num_attention_heads": 4, "vision_use_head": False},
        beats_config={
            "embed_dim": 128,
            "encoder_embed_dim": 128,
            "encoder_ffn_embed_dim": 256,
            "encoder_attention_heads": 4,
            "conv_pos": 16,
            "conv_pos_groups": 4,
            "num_buckets": 32,
            "max_distance": 64,
            **sound,
        },
        stc_depth=1,
        stc_mlp_depth=2,
        audio_seconds=seconds,
        audio_clips=1,
        audio_clip_seconds=seconds,
        num_mel_bins=48,
    )
