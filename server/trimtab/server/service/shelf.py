"""The shelf: the bundles that requests can name, changed while the server runs.

    put      bytes ─► parsed, checked against the model ─► in every worker ─► named
    remove   the name is gone at once; rows stay in the workers until the last request that uses them has ended

A name always means one bundle, and a request keeps the one that its name meant when it was admitted. What the operator gave at
the start is pinned: it is neither replaced nor removed until it is unpinned. What the registry holds stands here by its
reference, `calm:v3`, and comes and goes with its state alone.
"""

import asyncio
import logging
from collections.abc import Iterator, Mapping

from vllm.engine.protocol import EngineClient

from trimtab.attribution.bundle import Bundle, BundleError, ModelIdentity
from trimtab.server.engine.bundles import load_bundle, release_bundle, retire_bundle
from trimtab.server.errors import Conflict, Forbidden, InvalidBundle, Overloaded, UnknownBundle, Unsupported
from trimtab.server.service.flights import Flights
from trimtab.server.service.metrics import Metrics

__all__ = ["MAX_SHELF_BYTES", "MAX_UPLOAD_BYTES", "Shelf"]

MAX_UPLOAD_BYTES = 256 << 20
"""Of one bundle's file, checked before anything is parsed."""
MAX_SHELF_BYTES = 2 << 30
"""Of all bundles' tensors, those included whose rows are still in use."""
POLL_SECONDS = 0.1
log = logging.getLogger("trimtab")


class Shelf(Mapping[str, Bundle]):
    """The bundles by name; `mutable` says whether clients may change them."""

    def __init__(
        self, engine: EngineClient, model: ModelIdentity, metrics: Metrics, flights: Flights, *, mutable: bool
    ) -> None:
        self._engine = engine
        self._model = model
        self._metrics = metrics
        self._flights = flights
        self._mutable = mutable
        self._named: dict[str, Bundle] = {}
        self._pinned: set[str] = set()
        self._leaving: dict[str, asyncio.Task[None]] = {}
        self._sizes: dict[str, int] = {}
        """Bytes of every bundle in the workers, by content hash."""
        self._changing = asyncio.Lock()

    def __getitem__(self, name: str) -> Bundle:
        return self._named[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)

    def is_pinned(self, name: str) -> bool:
        """Whether a bundle can be neither replaced nor removed."""
        return name in self._pinned or _is_registered(name)

    def require_mutable(self) -> None:
        """Nothing, when clients may change this shelf.

        Raises:
            Forbidden: they may not.
        """
        if not self._mutable:
            raise Forbidden(
                "this server's bundles were chosen at its start; start it with --allow-bundle-upload to change them at run time"
            )

    async def put(self, data: bytes, *, replace: bool, pin: bool) -> tuple[Bundle, bool]:
        """The bundle of these bytes, now in every worker and named, and whether it is new.

        Raises:
            InvalidBundle: the bytes are no bundle, or one of another model.
            Conflict: another bundle has its name, and is not to be replaced or is pinned.
            Overloaded: the shelf is full.
        """
        try:
            bundle = await asyncio.to_thread(Bundle.from_bytes, data)
            bundle.check_model(self._model)
        except BundleError as e:
            raise InvalidBundle(str(e), field="body") from e
        return await self.add(bundle, replace=replace, pin=pin)

    async def add(self, bundle: Bundle, *, replace: bool = False, pin: bool = False) -> tuple[Bundle, bool]:
        """`put` of a bundle that is parsed and checked."""
        name = bundle.header.name
        async with self._changing:
            before = self._named.get(name)
            is_new = before is None or before.content_hash != bundle.content_hash
            if before is not None and is_new and not replace:
                raise Conflict(
                    f"another bundle is named {name!r} ({before.content_hash}); give ?replace=true, or delete it first",
                    field="replace",
                )
            if before is not None and is_new:
                self._require_unpinned(name)
            if is_new:
                self._require_room(bundle)
                await self._load(bundle)
                self._named[name] = bundle
                if before is not None:
                    self._leave(before)
                self._metrics.bundles_loaded.set(len(self._named))
            if pin:
                self._pinned.add(name)
        return bundle, is_new

    async def hold(self, reference: str, bundle: Bundle) -> None:
        """Loads a version of the registry; holding it again changes nothing.

        Raises:
            InvalidBundle: it was made for another model.
            Overloaded: the shelf is full.
        """
        try:
            bundle.check_model(self._model)
        except BundleError as e:
            raise InvalidBundle(str(e), field="version") from e
        async with self._changing:
            if reference not in self._named:
                self._require_room(bundle)
                await self._load(bundle)
                self._named[reference] = bundle
                self._metrics.bundles_loaded.set(len(self._named))

    def withdraw(self, reference: str) -> None:
        """Takes a version of the registry off at once, whatever the engine does; its rows go after its last request."""
        bundle = self._named.pop(reference, None)
        if bundle is not None:
            self._leave(bundle)
            self._metrics.bundles_loaded.set(len(self._named))

    async def remove(self, name: str) -> Bundle:
        """The bundle that no request can name from now on.

        Raises:
            UnknownBundle: there is none of that name.
            Conflict: it is pinned.
        """
        async with self._changing:
            bundle = self.find(name)
            self._require_unpinned(name)
            del self._named[name]
            self._leave(bundle)
            self._metrics.bundles_loaded.set(len(self._named))
        return bundle

    def pin(self, name: str, pinned: bool) -> Bundle:
        """The bundle, pinned or not any more.

        Raises:
            UnknownBundle: there is none of that name.
            Conflict: it is the registry's.
        """
        bundle = self.find(name)
        if _is_registered(name):
            raise Conflict(_REGISTERED, field="name")
        (self._pinned.add if pinned else self._pinned.discard)(name)
        return bundle

    def find(self, name: str) -> Bundle:
        """The bundle of that name.

        Raises:
            UnknownBundle: there is none.
        """
        if name not in self._named:
            raise UnknownBundle(
                f"bundle {name!r} is not loaded; GET /v1/steering/bundles lists those that are", field="name"
            )
        return self._named[name]

    async def close(self) -> None:
        """Stop waiting for rows that are still in use."""
        for task in list(self._leaving.values()):
            task.cancel()
        await asyncio.gather(*self._leaving.values(), return_exceptions=True)

    async def _load(self, bundle: Bundle) -> None:
        digest = bundle.content_hash
        if (task := self._leaving.pop(digest, None)) is not None:
            task.cancel()
        try:
            await load_bundle(self._engine, bundle)
        except Unsupported as e:
            raise InvalidBundle(e.message, field="body") from e
        self._sizes[digest] = _n_bytes(bundle)

    def _leave(self, bundle: Bundle) -> None:
        digest = bundle.content_hash
        if any(other.content_hash == digest for other in self._named.values()):
            return
        retire_bundle(digest)
        self._leaving[digest] = asyncio.create_task(self._release(digest))

    async def _release(self, digest: str) -> None:
        try:
            # The engine hears of a request after its admission, on a crowded machine seconds after; its flight tells at once.
            while self._flights.use(digest):
                await asyncio.sleep(POLL_SECONDS)
            if await release_bundle(self._engine, digest):
                self._sizes.pop(digest, None)
        except Exception:
            if not self._engine.errored:  # A dead engine ends the server, which says so itself.
                log.exception("the rows of bundle %s could not be dropped; they stay in the workers", digest)
        finally:
            if self._leaving.get(digest) is asyncio.current_task():
                del self._leaving[digest]

    def _require_unpinned(self, name: str) -> None:
        if _is_registered(name):
            raise Conflict(_REGISTERED, field="name")
        if name in self._pinned:
            raise Conflict(f"bundle {name!r} is pinned; DELETE /v1/steering/bundles/{name}/pin first", field="name")

    def _require_room(self, bundle: Bundle) -> None:
        held = {**self._sizes, bundle.content_hash: _n_bytes(bundle)}
        if sum(held.values()) > MAX_SHELF_BYTES:
            raise Overloaded(
                f"the bundles would take {sum(held.values()) >> 20} MiB and this server holds {MAX_SHELF_BYTES >> 20} MiB "
                f"({len(self._leaving)} are waiting for their last request); delete one, or ask again later"
            )


_REGISTERED = "this version is the registry's; promote and revoke it there"


def _is_registered(name: str) -> bool:
    return ":" in name  # No bundle's own name has one.


def _n_bytes(bundle: Bundle) -> int:
    rows = (bundle.decoder, bundle.encoder, bundle.bias, bundle.threshold, bundle.baseline, bundle.vectors)
    return sum(array.nbytes for array in rows)
