import datetime

from google.protobuf import struct_pb2 as _struct_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ExperimentState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EXPERIMENT_STATE_UNSPECIFIED: _ClassVar[ExperimentState]
    EXPERIMENT_STATE_DRAFT: _ClassVar[ExperimentState]
    EXPERIMENT_STATE_RUNNING: _ClassVar[ExperimentState]
    EXPERIMENT_STATE_PAUSED: _ClassVar[ExperimentState]
    EXPERIMENT_STATE_STOPPED: _ClassVar[ExperimentState]
    EXPERIMENT_STATE_ARCHIVED: _ClassVar[ExperimentState]
    EXPERIMENT_STATE_PURGED: _ClassVar[ExperimentState]

class Verdict(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VERDICT_UNSPECIFIED: _ClassVar[Verdict]
    VERDICT_COLLECTING: _ClassVar[Verdict]
    VERDICT_BETTER: _ClassVar[Verdict]
    VERDICT_WORSE: _ClassVar[Verdict]
    VERDICT_NO_EFFECT: _ClassVar[Verdict]
    VERDICT_INVALID: _ClassVar[Verdict]

class Population(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    POPULATION_UNSPECIFIED: _ClassVar[Population]
    POPULATION_INTENT_TO_TREAT: _ClassVar[Population]
    POPULATION_TRIGGERED: _ClassVar[Population]
    POPULATION_PER_PROTOCOL: _ClassVar[Population]

class GuardrailState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GUARDRAIL_STATE_UNSPECIFIED: _ClassVar[GuardrailState]
    GUARDRAIL_STATE_COLLECTING: _ClassVar[GuardrailState]
    GUARDRAIL_STATE_SAFE: _ClassVar[GuardrailState]
    GUARDRAIL_STATE_BREACHED: _ClassVar[GuardrailState]
EXPERIMENT_STATE_UNSPECIFIED: ExperimentState
EXPERIMENT_STATE_DRAFT: ExperimentState
EXPERIMENT_STATE_RUNNING: ExperimentState
EXPERIMENT_STATE_PAUSED: ExperimentState
EXPERIMENT_STATE_STOPPED: ExperimentState
EXPERIMENT_STATE_ARCHIVED: ExperimentState
EXPERIMENT_STATE_PURGED: ExperimentState
VERDICT_UNSPECIFIED: Verdict
VERDICT_COLLECTING: Verdict
VERDICT_BETTER: Verdict
VERDICT_WORSE: Verdict
VERDICT_NO_EFFECT: Verdict
VERDICT_INVALID: Verdict
POPULATION_UNSPECIFIED: Population
POPULATION_INTENT_TO_TREAT: Population
POPULATION_TRIGGERED: Population
POPULATION_PER_PROTOCOL: Population
GUARDRAIL_STATE_UNSPECIFIED: GuardrailState
GUARDRAIL_STATE_COLLECTING: GuardrailState
GUARDRAIL_STATE_SAFE: GuardrailState
GUARDRAIL_STATE_BREACHED: GuardrailState

class CreateExperimentRequest(_message.Message):
    __slots__ = ("definition", "reason")
    DEFINITION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    definition: _struct_pb2.Struct
    reason: str
    def __init__(self, definition: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., reason: _Optional[str] = ...) -> None: ...

class EditExperimentRequest(_message.Message):
    __slots__ = ("key", "definition", "reason", "revision")
    KEY_FIELD_NUMBER: _ClassVar[int]
    DEFINITION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    key: str
    definition: _struct_pb2.Struct
    reason: str
    revision: int
    def __init__(self, key: _Optional[str] = ..., definition: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., reason: _Optional[str] = ..., revision: _Optional[int] = ...) -> None: ...

class ChangeExperimentRequest(_message.Message):
    __slots__ = ("key", "reason", "revision")
    KEY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    key: str
    reason: str
    revision: int
    def __init__(self, key: _Optional[str] = ..., reason: _Optional[str] = ..., revision: _Optional[int] = ...) -> None: ...

class RampExperimentRequest(_message.Message):
    __slots__ = ("key", "coverage", "reason", "revision")
    KEY_FIELD_NUMBER: _ClassVar[int]
    COVERAGE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    key: str
    coverage: float
    reason: str
    revision: int
    def __init__(self, key: _Optional[str] = ..., coverage: _Optional[float] = ..., reason: _Optional[str] = ..., revision: _Optional[int] = ...) -> None: ...

class GetExperimentRequest(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: str
    def __init__(self, key: _Optional[str] = ...) -> None: ...

class ListExperimentsRequest(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: ExperimentState
    def __init__(self, state: _Optional[_Union[ExperimentState, str]] = ...) -> None: ...

class ListExperimentsResponse(_message.Message):
    __slots__ = ("experiments",)
    EXPERIMENTS_FIELD_NUMBER: _ClassVar[int]
    experiments: _containers.RepeatedCompositeFieldContainer[Experiment]
    def __init__(self, experiments: _Optional[_Iterable[_Union[Experiment, _Mapping]]] = ...) -> None: ...

class Experiment(_message.Message):
    __slots__ = ("key", "state", "coverage", "revision", "changed_at", "covered_since", "started_at", "step", "approved", "plans", "definition")
    class PlansEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    KEY_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    COVERAGE_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    CHANGED_AT_FIELD_NUMBER: _ClassVar[int]
    COVERED_SINCE_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    APPROVED_FIELD_NUMBER: _ClassVar[int]
    PLANS_FIELD_NUMBER: _ClassVar[int]
    DEFINITION_FIELD_NUMBER: _ClassVar[int]
    key: str
    state: ExperimentState
    coverage: float
    revision: int
    changed_at: _timestamp_pb2.Timestamp
    covered_since: _timestamp_pb2.Timestamp
    started_at: _timestamp_pb2.Timestamp
    step: int
    approved: int
    plans: _containers.ScalarMap[str, str]
    definition: _struct_pb2.Struct
    def __init__(self, key: _Optional[str] = ..., state: _Optional[_Union[ExperimentState, str]] = ..., coverage: _Optional[float] = ..., revision: _Optional[int] = ..., changed_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., covered_since: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., started_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., step: _Optional[int] = ..., approved: _Optional[int] = ..., plans: _Optional[_Mapping[str, str]] = ..., definition: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ...) -> None: ...

class ArmHealth(_message.Message):
    __slots__ = ("key", "unit_count", "triggered_unit_count", "request_count", "statuses")
    class StatusesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    KEY_FIELD_NUMBER: _ClassVar[int]
    UNIT_COUNT_FIELD_NUMBER: _ClassVar[int]
    TRIGGERED_UNIT_COUNT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_COUNT_FIELD_NUMBER: _ClassVar[int]
    STATUSES_FIELD_NUMBER: _ClassVar[int]
    key: str
    unit_count: int
    triggered_unit_count: int
    request_count: int
    statuses: _containers.ScalarMap[str, int]
    def __init__(self, key: _Optional[str] = ..., unit_count: _Optional[int] = ..., triggered_unit_count: _Optional[int] = ..., request_count: _Optional[int] = ..., statuses: _Optional[_Mapping[str, int]] = ...) -> None: ...

class NextStep(_message.Message):
    __slots__ = ("coverage", "at", "min_unit_count", "waits_for")
    COVERAGE_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    MIN_UNIT_COUNT_FIELD_NUMBER: _ClassVar[int]
    WAITS_FOR_FIELD_NUMBER: _ClassVar[int]
    coverage: float
    at: _timestamp_pb2.Timestamp
    min_unit_count: int
    waits_for: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, coverage: _Optional[float] = ..., at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., min_unit_count: _Optional[int] = ..., waits_for: _Optional[_Iterable[str]] = ...) -> None: ...

class ExperimentHealth(_message.Message):
    __slots__ = ("healthy", "problems", "decisions", "written_count", "dropped_count", "waiting_count", "arms", "crossover_count", "sample_ratio_p", "next_step")
    class DecisionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    HEALTHY_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    DECISIONS_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    DROPPED_COUNT_FIELD_NUMBER: _ClassVar[int]
    WAITING_COUNT_FIELD_NUMBER: _ClassVar[int]
    ARMS_FIELD_NUMBER: _ClassVar[int]
    CROSSOVER_COUNT_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_RATIO_P_FIELD_NUMBER: _ClassVar[int]
    NEXT_STEP_FIELD_NUMBER: _ClassVar[int]
    healthy: bool
    problems: _containers.RepeatedScalarFieldContainer[str]
    decisions: _containers.ScalarMap[str, int]
    written_count: int
    dropped_count: int
    waiting_count: int
    arms: _containers.RepeatedCompositeFieldContainer[ArmHealth]
    crossover_count: int
    sample_ratio_p: float
    next_step: NextStep
    def __init__(self, healthy: _Optional[bool] = ..., problems: _Optional[_Iterable[str]] = ..., decisions: _Optional[_Mapping[str, int]] = ..., written_count: _Optional[int] = ..., dropped_count: _Optional[int] = ..., waiting_count: _Optional[int] = ..., arms: _Optional[_Iterable[_Union[ArmHealth, _Mapping]]] = ..., crossover_count: _Optional[int] = ..., sample_ratio_p: _Optional[float] = ..., next_step: _Optional[_Union[NextStep, _Mapping]] = ...) -> None: ...

class Effect(_message.Message):
    __slots__ = ("metric", "arm", "population", "control_unit_count", "treated_unit_count", "control", "treated", "estimate", "low", "high", "p")
    METRIC_FIELD_NUMBER: _ClassVar[int]
    ARM_FIELD_NUMBER: _ClassVar[int]
    POPULATION_FIELD_NUMBER: _ClassVar[int]
    CONTROL_UNIT_COUNT_FIELD_NUMBER: _ClassVar[int]
    TREATED_UNIT_COUNT_FIELD_NUMBER: _ClassVar[int]
    CONTROL_FIELD_NUMBER: _ClassVar[int]
    TREATED_FIELD_NUMBER: _ClassVar[int]
    ESTIMATE_FIELD_NUMBER: _ClassVar[int]
    LOW_FIELD_NUMBER: _ClassVar[int]
    HIGH_FIELD_NUMBER: _ClassVar[int]
    P_FIELD_NUMBER: _ClassVar[int]
    metric: str
    arm: str
    population: Population
    control_unit_count: int
    treated_unit_count: int
    control: float
    treated: float
    estimate: float
    low: float
    high: float
    p: float
    def __init__(self, metric: _Optional[str] = ..., arm: _Optional[str] = ..., population: _Optional[_Union[Population, str]] = ..., control_unit_count: _Optional[int] = ..., treated_unit_count: _Optional[int] = ..., control: _Optional[float] = ..., treated: _Optional[float] = ..., estimate: _Optional[float] = ..., low: _Optional[float] = ..., high: _Optional[float] = ..., p: _Optional[float] = ...) -> None: ...

class GuardrailResult(_message.Message):
    __slots__ = ("metric", "arm", "margin", "harm", "low", "high", "state")
    METRIC_FIELD_NUMBER: _ClassVar[int]
    ARM_FIELD_NUMBER: _ClassVar[int]
    MARGIN_FIELD_NUMBER: _ClassVar[int]
    HARM_FIELD_NUMBER: _ClassVar[int]
    LOW_FIELD_NUMBER: _ClassVar[int]
    HIGH_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    metric: str
    arm: str
    margin: float
    harm: float
    low: float
    high: float
    state: GuardrailState
    def __init__(self, metric: _Optional[str] = ..., arm: _Optional[str] = ..., margin: _Optional[float] = ..., harm: _Optional[float] = ..., low: _Optional[float] = ..., high: _Optional[float] = ..., state: _Optional[_Union[GuardrailState, str]] = ...) -> None: ...

class ExperimentResults(_message.Message):
    __slots__ = ("units", "crossover_count", "sample_ratio_p", "verdicts", "effects", "guardrails", "units_needed", "days_left", "notes", "power", "over", "triggered_ratio_p")
    class UnitsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class VerdictsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Verdict
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Verdict, str]] = ...) -> None: ...
    class TriggeredRatioPEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    UNITS_FIELD_NUMBER: _ClassVar[int]
    CROSSOVER_COUNT_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_RATIO_P_FIELD_NUMBER: _ClassVar[int]
    VERDICTS_FIELD_NUMBER: _ClassVar[int]
    EFFECTS_FIELD_NUMBER: _ClassVar[int]
    GUARDRAILS_FIELD_NUMBER: _ClassVar[int]
    UNITS_NEEDED_FIELD_NUMBER: _ClassVar[int]
    DAYS_LEFT_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    POWER_FIELD_NUMBER: _ClassVar[int]
    OVER_FIELD_NUMBER: _ClassVar[int]
    TRIGGERED_RATIO_P_FIELD_NUMBER: _ClassVar[int]
    units: _containers.ScalarMap[str, int]
    crossover_count: int
    sample_ratio_p: float
    verdicts: _containers.ScalarMap[str, Verdict]
    effects: _containers.RepeatedCompositeFieldContainer[Effect]
    guardrails: _containers.RepeatedCompositeFieldContainer[GuardrailResult]
    units_needed: int
    days_left: float
    notes: _containers.RepeatedScalarFieldContainer[str]
    power: float
    over: str
    triggered_ratio_p: _containers.ScalarMap[str, float]
    def __init__(self, units: _Optional[_Mapping[str, int]] = ..., crossover_count: _Optional[int] = ..., sample_ratio_p: _Optional[float] = ..., verdicts: _Optional[_Mapping[str, Verdict]] = ..., effects: _Optional[_Iterable[_Union[Effect, _Mapping]]] = ..., guardrails: _Optional[_Iterable[_Union[GuardrailResult, _Mapping]]] = ..., units_needed: _Optional[int] = ..., days_left: _Optional[float] = ..., notes: _Optional[_Iterable[str]] = ..., power: _Optional[float] = ..., over: _Optional[str] = ..., triggered_ratio_p: _Optional[_Mapping[str, float]] = ...) -> None: ...

class WatchExperimentRequest(_message.Message):
    __slots__ = ("key", "interval_seconds")
    KEY_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    key: str
    interval_seconds: float
    def __init__(self, key: _Optional[str] = ..., interval_seconds: _Optional[float] = ...) -> None: ...

class WatchExperimentResponse(_message.Message):
    __slots__ = ("experiment", "health", "results")
    EXPERIMENT_FIELD_NUMBER: _ClassVar[int]
    HEALTH_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    experiment: Experiment
    health: ExperimentHealth
    results: ExperimentResults
    def __init__(self, experiment: _Optional[_Union[Experiment, _Mapping]] = ..., health: _Optional[_Union[ExperimentHealth, _Mapping]] = ..., results: _Optional[_Union[ExperimentResults, _Mapping]] = ...) -> None: ...

class Outcome(_message.Message):
    __slots__ = ("response_id", "user", "conversation", "tenant", "name", "value", "event", "at")
    RESPONSE_ID_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    CONVERSATION_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    response_id: str
    user: str
    conversation: str
    tenant: str
    name: str
    value: float
    event: str
    at: _timestamp_pb2.Timestamp
    def __init__(self, response_id: _Optional[str] = ..., user: _Optional[str] = ..., conversation: _Optional[str] = ..., tenant: _Optional[str] = ..., name: _Optional[str] = ..., value: _Optional[float] = ..., event: _Optional[str] = ..., at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class RecordOutcomesRequest(_message.Message):
    __slots__ = ("outcomes",)
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    outcomes: _containers.RepeatedCompositeFieldContainer[Outcome]
    def __init__(self, outcomes: _Optional[_Iterable[_Union[Outcome, _Mapping]]] = ...) -> None: ...

class RecordOutcomesResponse(_message.Message):
    __slots__ = ("recorded_count", "duplicate_count", "pending_count")
    RECORDED_COUNT_FIELD_NUMBER: _ClassVar[int]
    DUPLICATE_COUNT_FIELD_NUMBER: _ClassVar[int]
    PENDING_COUNT_FIELD_NUMBER: _ClassVar[int]
    recorded_count: int
    duplicate_count: int
    pending_count: int
    def __init__(self, recorded_count: _Optional[int] = ..., duplicate_count: _Optional[int] = ..., pending_count: _Optional[int] = ...) -> None: ...
