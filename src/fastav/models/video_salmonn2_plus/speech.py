"""The audio encoder: Whisper's, the Q-Former, and the projection to the decoder. Names are the original's."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from fastav.models._merging import encoded
from fastav.models._qformer import QFormer
from fastav.models.video_salmonn2_plus.configuration import VideoSalmonn2PlusAudioConfig
from fastav.models.video_salmonn2_plus.scheme import PIECE_TOKENS


class SpeechTower(WhisperEncoder):
    """Whisper's encoder, a Q-Former that turns every half second into one token, and a projection to the decoder."""

    config: VideoSalmonn2PlusAudioConfig

    def __init__(self, config: VideoSalmonn2PlusAudioConfig, out_hidden_size: int) -> None:
        super().__init__(config)
        shape = config.qformer
        self.qformer = QFormer(
            shape, shape.encoder_width, activation=shape.hidden_act, cross_every=shape.cross_attention_freq
        )
        self.q_tokens = nn.Parameter(torch.zeros(1, shape.query_length, shape.hidden_size))
        self.audio_proj = nn.Linear(shape.hidden_size, out_hidden_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SpeechTower):
            init.normal_(module.q_tokens, std=self.config.init_std)

    def summarize(self, speech: Float[Tensor, "pieces frames width"]) -> Float[Tensor, "windows queries hidden"]:
        """The Q-Former's output for every window."""
        return self.qformer(self.q_tokens, windows(speech, speech.shape[1] // PIECE_TOKENS))

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_features: Float[Tensor, "pieces bins rows"], **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """What Whisper's encoder returns; as `pooler_output` the tokens [pieces, tokens, hidden] of each piece of 30 s.

        kwargs: as the encoder takes them (`output_hidden_states`, ...).
        """
        whisper: Any = super()
        output = whisper.forward(input_features.to(self.dtype), **{**kwargs, "return_dict": True})
        tokens = self.audio_proj(self.summarize(output.last_hidden_state))
        tokens = tokens.reshape(len(input_features), -1, tokens.shape[-1])
        return encoded(
            output.last_hidden_state, tokens, hidden_states=output.hidden_states, attentions=output.attentions
        )


def windows(speech: Float[Tensor, "pieces frames width"], size: int) -> Float[Tensor, "windows size width"]:
    """The frames of each piece in windows that follow one another; frames that fill none are left out."""
    pieces, frames, width = speech.shape
    whole = speech[:, : frames // size * size]
    return torch.reshape(whole, (pieces * (frames // size), size, width))
