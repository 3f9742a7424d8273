from trimtab.v1 import inference_pb2 as _inference_pb2
from trimtab.v1 import steering_pb2 as _steering_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ValidateRequest(_message.Message):
    __slots__ = ("steering",)
    STEERING_FIELD_NUMBER: _ClassVar[int]
    steering: _steering_pb2.Steering
    def __init__(self, steering: _Optional[_Union[_steering_pb2.Steering, _Mapping]] = ...) -> None: ...

class ListBundlesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListBundlesResponse(_message.Message):
    __slots__ = ("bundles",)
    BUNDLES_FIELD_NUMBER: _ClassVar[int]
    bundles: _containers.RepeatedCompositeFieldContainer[_steering_pb2.BundleSummary]
    def __init__(self, bundles: _Optional[_Iterable[_Union[_steering_pb2.BundleSummary, _Mapping]]] = ...) -> None: ...

class GetBundleRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class Bundle(_message.Message):
    __slots__ = ("summary", "latents", "vectors", "sae", "resid_norm")
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    LATENTS_FIELD_NUMBER: _ClassVar[int]
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    SAE_FIELD_NUMBER: _ClassVar[int]
    RESID_NORM_FIELD_NUMBER: _ClassVar[int]
    summary: _steering_pb2.BundleSummary
    latents: _containers.RepeatedCompositeFieldContainer[BundleLatent]
    vectors: _containers.RepeatedCompositeFieldContainer[BundleVector]
    sae: str
    resid_norm: float
    def __init__(self, summary: _Optional[_Union[_steering_pb2.BundleSummary, _Mapping]] = ..., latents: _Optional[_Iterable[_Union[BundleLatent, _Mapping]]] = ..., vectors: _Optional[_Iterable[_Union[BundleVector, _Mapping]]] = ..., sae: _Optional[str] = ..., resid_norm: _Optional[float] = ...) -> None: ...

class BundleLatent(_message.Message):
    __slots__ = ("latent", "label", "attribution", "attribution_se", "effect", "effect_se", "max_activation", "density", "strength_min", "strength_max", "top_tokens")
    LATENT_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTION_SE_FIELD_NUMBER: _ClassVar[int]
    EFFECT_FIELD_NUMBER: _ClassVar[int]
    EFFECT_SE_FIELD_NUMBER: _ClassVar[int]
    MAX_ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    DENSITY_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_MIN_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_MAX_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    latent: int
    label: str
    attribution: float
    attribution_se: float
    effect: float
    effect_se: float
    max_activation: float
    density: float
    strength_min: float
    strength_max: float
    top_tokens: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, latent: _Optional[int] = ..., label: _Optional[str] = ..., attribution: _Optional[float] = ..., attribution_se: _Optional[float] = ..., effect: _Optional[float] = ..., effect_se: _Optional[float] = ..., max_activation: _Optional[float] = ..., density: _Optional[float] = ..., strength_min: _Optional[float] = ..., strength_max: _Optional[float] = ..., top_tokens: _Optional[_Iterable[str]] = ...) -> None: ...

class BundleVector(_message.Message):
    __slots__ = ("name", "source", "norm")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    NORM_FIELD_NUMBER: _ClassVar[int]
    name: str
    source: str
    norm: float
    def __init__(self, name: _Optional[str] = ..., source: _Optional[str] = ..., norm: _Optional[float] = ...) -> None: ...

class Chat(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[_inference_pb2.ChatMessage]
    def __init__(self, messages: _Optional[_Iterable[_Union[_inference_pb2.ChatMessage, _Mapping]]] = ...) -> None: ...

class InspectRequest(_message.Message):
    __slots__ = ("text", "token_ids", "chat", "bundle", "top_count", "steering")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    TOP_COUNT_FIELD_NUMBER: _ClassVar[int]
    STEERING_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: _inference_pb2.TokenIds
    chat: Chat
    bundle: str
    top_count: int
    steering: _steering_pb2.Steering
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Union[_inference_pb2.TokenIds, _Mapping]] = ..., chat: _Optional[_Union[Chat, _Mapping]] = ..., bundle: _Optional[str] = ..., top_count: _Optional[int] = ..., steering: _Optional[_Union[_steering_pb2.Steering, _Mapping]] = ...) -> None: ...

class LatentActivation(_message.Message):
    __slots__ = ("latent", "activation", "fraction_of_max")
    LATENT_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    FRACTION_OF_MAX_FIELD_NUMBER: _ClassVar[int]
    latent: int
    activation: float
    fraction_of_max: float
    def __init__(self, latent: _Optional[int] = ..., activation: _Optional[float] = ..., fraction_of_max: _Optional[float] = ...) -> None: ...

class InspectedToken(_message.Message):
    __slots__ = ("id", "text", "latents")
    ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LATENTS_FIELD_NUMBER: _ClassVar[int]
    id: int
    text: str
    latents: _containers.RepeatedCompositeFieldContainer[LatentActivation]
    def __init__(self, id: _Optional[int] = ..., text: _Optional[str] = ..., latents: _Optional[_Iterable[_Union[LatentActivation, _Mapping]]] = ...) -> None: ...

class InspectResponse(_message.Message):
    __slots__ = ("content_hash", "hook_point", "tokens", "steering")
    CONTENT_HASH_FIELD_NUMBER: _ClassVar[int]
    HOOK_POINT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEERING_FIELD_NUMBER: _ClassVar[int]
    content_hash: str
    hook_point: str
    tokens: _containers.RepeatedCompositeFieldContainer[InspectedToken]
    steering: _steering_pb2.Applied
    def __init__(self, content_hash: _Optional[str] = ..., hook_point: _Optional[str] = ..., tokens: _Optional[_Iterable[_Union[InspectedToken, _Mapping]]] = ..., steering: _Optional[_Union[_steering_pb2.Applied, _Mapping]] = ...) -> None: ...
