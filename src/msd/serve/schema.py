"""The bodies of requests, in OpenAI's form. What is not listed is refused, never ignored.

Lengths and counts are limited here, before any media is read.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST = {"image": 16, "video": 4, "audio": 4, "recording": 1}  # per request
FRAMES = 16  # of a recording
MESSAGES = 256
ANSWERS = 8  # n
STOPS = 4
COLDEST = 1e-6  # the smallest temperature that samples: logits divided by it stay finite

Name = Annotated[str, Field(max_length=512)]
Text = Annotated[str, Field(max_length=200_000)]


class Strict(BaseModel):
    """A body without unknown fields."""

    model_config = ConfigDict(extra="forbid")


class TextPart(Strict):
    """Text of a message."""

    type: Literal["text"]
    text: Text


class ImageUrl(Strict):
    """An image as a data URI. `detail` has no effect on a model with one resolution; only "auto" is accepted."""

    url: str
    detail: Literal["auto"] = "auto"


class ImagePart(Strict):
    """An image of a message."""

    kind: ClassVar[str] = "image"
    type: Literal["image_url"]
    image_url: ImageUrl

    @property
    def address(self) -> str:
        """Where the image is."""
        return self.image_url.url


class VideoUrl(Strict):
    """A video as a data URI."""

    url: str


class VideoPart(Strict):
    """A video of a message."""

    kind: ClassVar[str] = "video"
    type: Literal["video_url"]
    video_url: VideoUrl

    @property
    def address(self) -> str:
        """Where the video is."""
        return self.video_url.url


class InputAudio(Strict):
    """A sound file in base64."""

    data: str
    format: Literal["wav", "mp3"]


class AudioPart(Strict):
    """A sound of a message."""

    kind: ClassVar[str] = "audio"
    type: Literal["input_audio"]
    input_audio: InputAudio

    @property
    def address(self) -> str:
        """The sound as a data URI."""
        return f"data:audio/{self.input_audio.format};base64,{self.input_audio.data}"


class EventsUrl(Strict):
    """An event camera's recording as a data URI.

    format: the extension of its file; None: by its first bytes, which not every format fixes. frames: of the clip that
    the target sees of a recording without other media; None: as many as the server draws.
    """

    url: str
    format: Literal["npy", "npz", "h5", "hdf5", "aedat4", "es", "raw", "dat", "bin", "csv", "txt"] | None = None
    frames: Annotated[int | None, Field(ge=1, le=FRAMES)] = None


class EventsPart(Strict):
    """A recording of a message."""

    kind: ClassVar[str] = "recording"
    type: Literal["events_url"]
    events_url: EventsUrl

    @property
    def address(self) -> str:
        """Where the recording is."""
        return self.events_url.url


Part = Annotated[TextPart | ImagePart | VideoPart | AudioPart | EventsPart, Field(discriminator="type")]


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]


class StreamOptions(Strict):
    """Options of a streamed answer."""

    include_usage: bool = False


class Extension(Strict):
    """The field `msd`: how this request is drafted. None: as the server does; ε: that of the server's own policy.

    trace: add each step and its draft tree to the events of a stream.
    """

    method: Name | None = None
    policy: Name | None = None
    epsilon: float | None = None
    trace: bool = False


def _nullable(schema: dict[str, Any]) -> None:
    """Has a JSON schema say what `Completion._defaults` does: null is a default, also of unknown fields."""
    for name, field in schema["properties"].items():
        if name not in schema["required"]:
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}]}
    schema["additionalProperties"] = {"type": "null"}


class Completion(Strict):
    """The body of `POST /v1/chat/completions`."""

    model_config = ConfigDict(extra="forbid", json_schema_extra=_nullable)

    model: Name
    messages: Annotated[list[Message], Field(min_length=1, max_length=MESSAGES)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    seed: Annotated[int | None, Field(ge=-(1 << 63), lt=(1 << 63) - ANSWERS)] = None
    n: Annotated[int, Field(ge=1, le=ANSWERS)] = 1
    stop: Annotated[str, Field(min_length=1, max_length=200)] | list[
        Annotated[str, Field(min_length=1, max_length=200)]
    ] | None = None  # fmt: skip
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    presence_penalty: Literal[0] = 0
    frequency_penalty: Literal[0] = 0
    user: Name | None = None
    msd: Extension = Extension()

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, body: Any) -> Any:
        """A field that is null has its default, as in OpenAI's interface."""
        return {name: value for name, value in body.items() if value is not None} if isinstance(body, dict) else body

    @model_validator(mode="after")
    def _consistent(self) -> Completion:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_tokens or max_completion_tokens, not both")
        if 0.0 < self.temperature < COLDEST:
            raise ValueError(f"temperature must be 0, or at least {COLDEST}")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for stream=true")
        if self.msd.trace and not self.stream:
            raise ValueError("msd.trace is for stream=true")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if len(self.stops) > STOPS:
            raise ValueError(f"{len(self.stops)} stop strings; at most {STOPS}")
        for kind, most in MOST.items():
            count = sum(part == kind for part, _ in self.media)
            if count > most:
                name = "sound" if kind == "audio" else kind
                raise ValueError(f"{count} {name}s; at most {most} in a request")
        if self.recording is not None and self.recording.frames is not None and not self.drawn:
            raise ValueError("events_url.frames is for a recording without other media; leave it out")
        return self

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def media(self) -> list[tuple[str, str]]:
        """(kind, address) of all media, in reading order. The kinds are those of `MOST`."""
        return [(part.kind, part.address) for part in self._parts if not isinstance(part, TextPart)]

    @property
    def _parts(self) -> list[Part]:
        """All parts of all messages."""
        return [part for message in self.messages if isinstance(message.content, list) for part in message.content]

    @property
    def recording(self) -> EventsUrl | None:
        """The event camera's recording."""
        return next((part.events_url for part in self._parts if isinstance(part, EventsPart)), None)

    @property
    def drawn(self) -> bool:
        """Whether the target sees frames of the recording, because it sees nothing else."""
        return [kind for kind, _ in self.media] == ["recording"]

    def texts(self) -> list[str]:
        """All text of each message."""
        return [
            message.content
            if isinstance(message.content, str)
            else "".join(part.text for part in message.content if isinstance(part, TextPart))
            for message in self.messages
        ]

    def chat(self) -> list[dict[str, object]]:
        """The messages, with placeholders for the media that the target sees."""
        return [
            {
                "role": message.role,
                "content": message.content
                if isinstance(message.content, str)
                else [shown for part in message.content for shown in self._shown(part)],
            }
            for message in self.messages
        ]

    def _shown(self, part: Part) -> list[dict[str, str]]:
        """A part as `chat` has it: a recording is a video, or nothing."""
        if isinstance(part, TextPart):
            return [{"type": "text", "text": part.text}]
        if isinstance(part, EventsPart):
            return [{"type": "video"}] if self.drawn else []
        return [{"type": part.kind}]


class About(Strict):
    """A body about the messages of a chat, instead of a question."""

    model: str
    messages: list[Message]

    @model_validator(mode="after")
    def _valid(self) -> About:
        self.asked()
        return self

    def asked(self) -> Completion:
        """The completion with these messages; a ValueError if its messages are refused."""
        return Completion(model=self.model, messages=self.messages)
