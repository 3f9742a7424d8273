from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Operation(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OPERATION_UNSPECIFIED: _ClassVar[Operation]
    OPERATION_ADD: _ClassVar[Operation]
    OPERATION_ABLATE: _ClassVar[Operation]
    OPERATION_CLAMP: _ClassVar[Operation]
    OPERATION_SCALE: _ClassVar[Operation]
    OPERATION_PROJECT: _ClassVar[Operation]

class Unit(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UNIT_UNSPECIFIED: _ClassVar[Unit]
    UNIT_RAW: _ClassVar[Unit]
    UNIT_MAX_ACT: _ClassVar[Unit]
    UNIT_RESID_NORM: _ClassVar[Unit]

class ScopeTokens(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SCOPE_TOKENS_UNSPECIFIED: _ClassVar[ScopeTokens]
    SCOPE_TOKENS_PROMPT: _ClassVar[ScopeTokens]
    SCOPE_TOKENS_COMPLETION: _ClassVar[ScopeTokens]
    SCOPE_TOKENS_ALL: _ClassVar[ScopeTokens]

class Origin(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ORIGIN_UNSPECIFIED: _ClassVar[Origin]
    ORIGIN_START: _ClassVar[Origin]
    ORIGIN_PROMPT_END: _ClassVar[Origin]
    ORIGIN_COMPLETION: _ClassVar[Origin]

class GateMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GATE_MODE_UNSPECIFIED: _ClassVar[GateMode]
    GATE_MODE_TOKEN: _ClassVar[GateMode]
    GATE_MODE_ONWARD: _ClassVar[GateMode]

class OnFailure(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ON_FAILURE_UNSPECIFIED: _ClassVar[OnFailure]
    ON_FAILURE_CLOSED: _ClassVar[OnFailure]
    ON_FAILURE_OPEN: _ClassVar[OnFailure]

class Status(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STATUS_UNSPECIFIED: _ClassVar[Status]
    STATUS_APPLIED: _ClassVar[Status]
    STATUS_NOT_REQUESTED: _ClassVar[Status]
    STATUS_FAILED_OPEN: _ClassVar[Status]
    STATUS_REQUESTED: _ClassVar[Status]
    STATUS_KILLED: _ClassVar[Status]
    STATUS_BLINDED: _ClassVar[Status]
OPERATION_UNSPECIFIED: Operation
OPERATION_ADD: Operation
OPERATION_ABLATE: Operation
OPERATION_CLAMP: Operation
OPERATION_SCALE: Operation
OPERATION_PROJECT: Operation
UNIT_UNSPECIFIED: Unit
UNIT_RAW: Unit
UNIT_MAX_ACT: Unit
UNIT_RESID_NORM: Unit
SCOPE_TOKENS_UNSPECIFIED: ScopeTokens
SCOPE_TOKENS_PROMPT: ScopeTokens
SCOPE_TOKENS_COMPLETION: ScopeTokens
SCOPE_TOKENS_ALL: ScopeTokens
ORIGIN_UNSPECIFIED: Origin
ORIGIN_START: Origin
ORIGIN_PROMPT_END: Origin
ORIGIN_COMPLETION: Origin
GATE_MODE_UNSPECIFIED: GateMode
GATE_MODE_TOKEN: GateMode
GATE_MODE_ONWARD: GateMode
ON_FAILURE_UNSPECIFIED: OnFailure
ON_FAILURE_CLOSED: OnFailure
ON_FAILURE_OPEN: OnFailure
STATUS_UNSPECIFIED: Status
STATUS_APPLIED: Status
STATUS_NOT_REQUESTED: Status
STATUS_FAILED_OPEN: Status
STATUS_REQUESTED: Status
STATUS_KILLED: Status
STATUS_BLINDED: Status

class PositionWindow(_message.Message):
    __slots__ = ("origin", "start", "stop")
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    origin: Origin
    start: int
    stop: int
    def __init__(self, origin: _Optional[_Union[Origin, str]] = ..., start: _Optional[int] = ..., stop: _Optional[int] = ...) -> None: ...

class Scope(_message.Message):
    __slots__ = ("tokens", "first_token", "window", "exclude_special")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_SPECIAL_FIELD_NUMBER: _ClassVar[int]
    tokens: ScopeTokens
    first_token: bool
    window: PositionWindow
    exclude_special: bool
    def __init__(self, tokens: _Optional[_Union[ScopeTokens, str]] = ..., first_token: _Optional[bool] = ..., window: _Optional[_Union[PositionWindow, _Mapping]] = ..., exclude_special: _Optional[bool] = ...) -> None: ...

class Gate(_message.Message):
    __slots__ = ("bundle", "latent", "above", "unit", "mode")
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    LATENT_FIELD_NUMBER: _ClassVar[int]
    ABOVE_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    bundle: str
    latent: int
    above: float
    unit: Unit
    mode: GateMode
    def __init__(self, bundle: _Optional[str] = ..., latent: _Optional[int] = ..., above: _Optional[float] = ..., unit: _Optional[_Union[Unit, str]] = ..., mode: _Optional[_Union[GateMode, str]] = ...) -> None: ...

class Edit(_message.Message):
    __slots__ = ("bundle", "latent", "vector", "operation", "amount", "target", "factor", "unit", "strength", "scope", "gate")
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    LATENT_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    FACTOR_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    GATE_FIELD_NUMBER: _ClassVar[int]
    bundle: str
    latent: int
    vector: str
    operation: Operation
    amount: float
    target: float
    factor: float
    unit: Unit
    strength: float
    scope: Scope
    gate: Gate
    def __init__(self, bundle: _Optional[str] = ..., latent: _Optional[int] = ..., vector: _Optional[str] = ..., operation: _Optional[_Union[Operation, str]] = ..., amount: _Optional[float] = ..., target: _Optional[float] = ..., factor: _Optional[float] = ..., unit: _Optional[_Union[Unit, str]] = ..., strength: _Optional[float] = ..., scope: _Optional[_Union[Scope, _Mapping]] = ..., gate: _Optional[_Union[Gate, _Mapping]] = ...) -> None: ...

class Edits(_message.Message):
    __slots__ = ("edits",)
    EDITS_FIELD_NUMBER: _ClassVar[int]
    edits: _containers.RepeatedCompositeFieldContainer[Edit]
    def __init__(self, edits: _Optional[_Iterable[_Union[Edit, _Mapping]]] = ...) -> None: ...

class Steering(_message.Message):
    __slots__ = ("bundle", "free_form", "strength", "on_failure")
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    FREE_FORM_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    ON_FAILURE_FIELD_NUMBER: _ClassVar[int]
    bundle: str
    free_form: Edits
    strength: float
    on_failure: OnFailure
    def __init__(self, bundle: _Optional[str] = ..., free_form: _Optional[_Union[Edits, _Mapping]] = ..., strength: _Optional[float] = ..., on_failure: _Optional[_Union[OnFailure, str]] = ...) -> None: ...

class HookPointProof(_message.Message):
    __slots__ = ("hook_point", "prompt_token_count", "completion_token_count", "cached_prompt_token_count", "max_relative_norm", "mean_relative_norm", "gate_firing_count", "special_token_count")
    HOOK_POINT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    CACHED_PROMPT_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    MAX_RELATIVE_NORM_FIELD_NUMBER: _ClassVar[int]
    MEAN_RELATIVE_NORM_FIELD_NUMBER: _ClassVar[int]
    GATE_FIRING_COUNT_FIELD_NUMBER: _ClassVar[int]
    SPECIAL_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    hook_point: str
    prompt_token_count: int
    completion_token_count: int
    cached_prompt_token_count: int
    max_relative_norm: float
    mean_relative_norm: float
    gate_firing_count: int
    special_token_count: int
    def __init__(self, hook_point: _Optional[str] = ..., prompt_token_count: _Optional[int] = ..., completion_token_count: _Optional[int] = ..., cached_prompt_token_count: _Optional[int] = ..., max_relative_norm: _Optional[float] = ..., mean_relative_norm: _Optional[float] = ..., gate_firing_count: _Optional[int] = ..., special_token_count: _Optional[int] = ...) -> None: ...

class Applied(_message.Message):
    __slots__ = ("status", "plan", "bundles", "prompt_token_count", "completion_token_count", "cached_prompt_token_count", "max_relative_norm", "hook_points", "reason", "mean_relative_norm", "gate_firing_count", "special_token_count", "experiment")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    BUNDLES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    CACHED_PROMPT_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    MAX_RELATIVE_NORM_FIELD_NUMBER: _ClassVar[int]
    HOOK_POINTS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MEAN_RELATIVE_NORM_FIELD_NUMBER: _ClassVar[int]
    GATE_FIRING_COUNT_FIELD_NUMBER: _ClassVar[int]
    SPECIAL_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    EXPERIMENT_FIELD_NUMBER: _ClassVar[int]
    status: Status
    plan: str
    bundles: _containers.RepeatedScalarFieldContainer[str]
    prompt_token_count: int
    completion_token_count: int
    cached_prompt_token_count: int
    max_relative_norm: float
    hook_points: _containers.RepeatedCompositeFieldContainer[HookPointProof]
    reason: str
    mean_relative_norm: float
    gate_firing_count: int
    special_token_count: int
    experiment: ExperimentArm
    def __init__(self, status: _Optional[_Union[Status, str]] = ..., plan: _Optional[str] = ..., bundles: _Optional[_Iterable[str]] = ..., prompt_token_count: _Optional[int] = ..., completion_token_count: _Optional[int] = ..., cached_prompt_token_count: _Optional[int] = ..., max_relative_norm: _Optional[float] = ..., hook_points: _Optional[_Iterable[_Union[HookPointProof, _Mapping]]] = ..., reason: _Optional[str] = ..., mean_relative_norm: _Optional[float] = ..., gate_firing_count: _Optional[int] = ..., special_token_count: _Optional[int] = ..., experiment: _Optional[_Union[ExperimentArm, _Mapping]] = ...) -> None: ...

class ExperimentArm(_message.Message):
    __slots__ = ("key", "arm")
    KEY_FIELD_NUMBER: _ClassVar[int]
    ARM_FIELD_NUMBER: _ClassVar[int]
    key: str
    arm: str
    def __init__(self, key: _Optional[str] = ..., arm: _Optional[str] = ...) -> None: ...

class RecommendedEdit(_message.Message):
    __slots__ = ("latent", "vector", "operation", "amount", "unit", "scope", "exclude_special")
    LATENT_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_SPECIAL_FIELD_NUMBER: _ClassVar[int]
    latent: int
    vector: str
    operation: Operation
    amount: float
    unit: Unit
    scope: ScopeTokens
    exclude_special: bool
    def __init__(self, latent: _Optional[int] = ..., vector: _Optional[str] = ..., operation: _Optional[_Union[Operation, str]] = ..., amount: _Optional[float] = ..., unit: _Optional[_Union[Unit, str]] = ..., scope: _Optional[_Union[ScopeTokens, str]] = ..., exclude_special: _Optional[bool] = ...) -> None: ...

class BundleSummary(_message.Message):
    __slots__ = ("name", "content_hash", "behaviour", "model", "hook_point", "latent_count", "vector_count", "edits", "pinned")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CONTENT_HASH_FIELD_NUMBER: _ClassVar[int]
    BEHAVIOUR_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    HOOK_POINT_FIELD_NUMBER: _ClassVar[int]
    LATENT_COUNT_FIELD_NUMBER: _ClassVar[int]
    VECTOR_COUNT_FIELD_NUMBER: _ClassVar[int]
    EDITS_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    name: str
    content_hash: str
    behaviour: str
    model: str
    hook_point: str
    latent_count: int
    vector_count: int
    edits: _containers.RepeatedCompositeFieldContainer[RecommendedEdit]
    pinned: bool
    def __init__(self, name: _Optional[str] = ..., content_hash: _Optional[str] = ..., behaviour: _Optional[str] = ..., model: _Optional[str] = ..., hook_point: _Optional[str] = ..., latent_count: _Optional[int] = ..., vector_count: _Optional[int] = ..., edits: _Optional[_Iterable[_Union[RecommendedEdit, _Mapping]]] = ..., pinned: _Optional[bool] = ...) -> None: ...

class Validation(_message.Message):
    __slots__ = ("plan", "bundles", "hook_points", "row_count")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    BUNDLES_FIELD_NUMBER: _ClassVar[int]
    HOOK_POINTS_FIELD_NUMBER: _ClassVar[int]
    ROW_COUNT_FIELD_NUMBER: _ClassVar[int]
    plan: str
    bundles: _containers.RepeatedScalarFieldContainer[str]
    hook_points: _containers.RepeatedScalarFieldContainer[str]
    row_count: int
    def __init__(self, plan: _Optional[str] = ..., bundles: _Optional[_Iterable[str]] = ..., hook_points: _Optional[_Iterable[str]] = ..., row_count: _Optional[int] = ...) -> None: ...
