from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class VersionState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VERSION_STATE_UNSPECIFIED: _ClassVar[VersionState]
    VERSION_STATE_DRAFT: _ClassVar[VersionState]
    VERSION_STATE_ACTIVE: _ClassVar[VersionState]
    VERSION_STATE_REVOKED: _ClassVar[VersionState]

class Running(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RUNNING_UNSPECIFIED: _ClassVar[Running]
    RUNNING_END: _ClassVar[Running]
    RUNNING_FINISH: _ClassVar[Running]
VERSION_STATE_UNSPECIFIED: VersionState
VERSION_STATE_DRAFT: VersionState
VERSION_STATE_ACTIVE: VersionState
VERSION_STATE_REVOKED: VersionState
RUNNING_UNSPECIFIED: Running
RUNNING_END: Running
RUNNING_FINISH: Running

class BundleVersion(_message.Message):
    __slots__ = ("reference", "name", "number", "state", "is_default", "content_hash", "file_digest", "byte_count", "model", "fingerprint", "hook_point", "behaviour", "is_signed", "created_at", "created_by", "changed_at", "reason", "running", "not_loaded")
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    IS_DEFAULT_FIELD_NUMBER: _ClassVar[int]
    CONTENT_HASH_FIELD_NUMBER: _ClassVar[int]
    FILE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BYTE_COUNT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    HOOK_POINT_FIELD_NUMBER: _ClassVar[int]
    BEHAVIOUR_FIELD_NUMBER: _ClassVar[int]
    IS_SIGNED_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    CREATED_BY_FIELD_NUMBER: _ClassVar[int]
    CHANGED_AT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    NOT_LOADED_FIELD_NUMBER: _ClassVar[int]
    reference: str
    name: str
    number: int
    state: VersionState
    is_default: bool
    content_hash: str
    file_digest: str
    byte_count: int
    model: str
    fingerprint: str
    hook_point: str
    behaviour: str
    is_signed: bool
    created_at: str
    created_by: str
    changed_at: str
    reason: str
    running: Running
    not_loaded: str
    def __init__(self, reference: _Optional[str] = ..., name: _Optional[str] = ..., number: _Optional[int] = ..., state: _Optional[_Union[VersionState, str]] = ..., is_default: _Optional[bool] = ..., content_hash: _Optional[str] = ..., file_digest: _Optional[str] = ..., byte_count: _Optional[int] = ..., model: _Optional[str] = ..., fingerprint: _Optional[str] = ..., hook_point: _Optional[str] = ..., behaviour: _Optional[str] = ..., is_signed: _Optional[bool] = ..., created_at: _Optional[str] = ..., created_by: _Optional[str] = ..., changed_at: _Optional[str] = ..., reason: _Optional[str] = ..., running: _Optional[_Union[Running, str]] = ..., not_loaded: _Optional[str] = ...) -> None: ...

class UploadBundleRequest(_message.Message):
    __slots__ = ("chunk", "end")
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    chunk: bytes
    end: UploadEnd
    def __init__(self, chunk: _Optional[bytes] = ..., end: _Optional[_Union[UploadEnd, _Mapping]] = ...) -> None: ...

class UploadEnd(_message.Message):
    __slots__ = ("digest", "signature")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    digest: str
    signature: str
    def __init__(self, digest: _Optional[str] = ..., signature: _Optional[str] = ...) -> None: ...

class UploadBundleResponse(_message.Message):
    __slots__ = ("version", "is_new")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    IS_NEW_FIELD_NUMBER: _ClassVar[int]
    version: BundleVersion
    is_new: bool
    def __init__(self, version: _Optional[_Union[BundleVersion, _Mapping]] = ..., is_new: _Optional[bool] = ...) -> None: ...

class PromoteRequest(_message.Message):
    __slots__ = ("reference", "reason", "make_default")
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MAKE_DEFAULT_FIELD_NUMBER: _ClassVar[int]
    reference: str
    reason: str
    make_default: bool
    def __init__(self, reference: _Optional[str] = ..., reason: _Optional[str] = ..., make_default: _Optional[bool] = ...) -> None: ...

class SetDefaultRequest(_message.Message):
    __slots__ = ("reference", "reason")
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    reference: str
    reason: str
    def __init__(self, reference: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class RevokeRequest(_message.Message):
    __slots__ = ("reference", "reason", "running")
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    reference: str
    reason: str
    running: Running
    def __init__(self, reference: _Optional[str] = ..., reason: _Optional[str] = ..., running: _Optional[_Union[Running, str]] = ...) -> None: ...

class ListVersionsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListVersionsResponse(_message.Message):
    __slots__ = ("versions",)
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    versions: _containers.RepeatedCompositeFieldContainer[BundleVersion]
    def __init__(self, versions: _Optional[_Iterable[_Union[BundleVersion, _Mapping]]] = ...) -> None: ...
