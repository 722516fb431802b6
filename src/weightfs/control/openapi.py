"""What the control socket answers, as an OpenAPI description: `GET /v1/openapi.json`.

Rule: a schema says what is always there (`required`) and leaves room for more: later versions add fields. What a frozen
dataclass of the engine says of itself is taken from it, so that it cannot be told twice and differently.
https://spec.openapis.org/oas/v3.1.0
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import sys
import types
import typing
from typing import Any, Final, TypeAlias

import weightfs
from weightfs.core.manifest import Trust
from weightfs.core.tensors import ModelInfo
from weightfs.engine.details import FileDetails, HeaderState
from weightfs.engine.explain import FetchStatus
from weightfs.engine.settings import FillMode
from weightfs.engine.status import EngineStatus, GcReport, Outcome, RefStatus, VerifyReport
from weightfs.errors import FailureKind
from weightfs.stacks import Stacks

Schema: TypeAlias = dict[str, Any]

TEXT: Final[Schema] = {"type": "string"}
NAME: Final[Schema] = {"type": "string", "minLength": 1}
FLAG: Final[Schema] = {"type": "boolean"}
COUNT: Final[Schema] = {"type": "integer", "minimum": 0}
NUMBER: Final[Schema] = {"type": "number"}
ANYTHING: Final[Schema] = {"type": "object"}

_SCALARS: Final[dict[object, Schema]] = {
    bool: FLAG,
    int: {"type": "integer"},
    float: {"type": ["number", "null"]},  # null: not finite, which JSON has no word for
    str: TEXT,
    bytes: TEXT,  # hexadecimal
}
_ERRORS: Final = {
    "400": "What was asked for is wrong, or names what is not there; nothing was done.",
    "409": "The cache, the daemon or the bytes themselves do not allow it.",
    "500": "A fault of weightfs itself; the daemon goes on.",
    "502": "An origin did not give what was asked of it.",
}
_JOB_STATES: Final = ("running", "done", "failed", "cancelled")


def record(**fields: Schema) -> Schema:
    """An object that always has these fields."""
    return {"type": "object", "required": list(fields), "properties": fields}


def many(items: Schema) -> Schema:
    """A list of them."""
    return {"type": "array", "items": items}


def one_of(values: typing.Iterable[str]) -> Schema:
    """One of these texts."""
    return {"type": "string", "enum": [str(value) for value in values]}


def or_null(schema: Schema) -> Schema:
    """The same, or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def schema_of(kind: Any) -> Schema:
    """Of a type as `documents.to_json` writes its values: dataclasses, enums, tuples, scalars. TypeError."""
    if kind in _SCALARS:
        return _SCALARS[kind]
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return record(**{field.name: schema_of(hints[field.name]) for field in dataclasses.fields(kind)})
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return one_of(member.value for member in kind)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return many(schema_of(arguments[0]))
    if origin is tuple:
        prefix = [schema_of(one) for one in arguments]
        return {"type": "array", "prefixItems": prefix, "minItems": len(prefix), "maxItems": len(prefix)}
    if origin in (types.UnionType, typing.Union) and len(arguments) == 2 and type(None) in arguments:
        return or_null(schema_of(next(one for one in arguments if one is not type(None))))
    raise TypeError(f"{kind} has no schema")


def _joined(*schemas: Schema, **changed: Schema) -> Schema:
    """One object with the fields of all."""
    fields: dict[str, Schema] = {}
    for schema in schemas:
        fields |= schema["properties"]
    return record(**(fields | changed))


def _schemas() -> dict[str, Schema]:
    health = record(
        version=TEXT,
        pid=COUNT,
        role=TEXT,
        cache=TEXT,
        mountpoint=or_null(TEXT),
        started_at=COUNT,
    )
    blob = record(
        path=TEXT,
        id=TEXT,
        size_bytes=COUNT,
        present_bytes=COUNT,
        complete=FLAG,
        trust=one_of(Trust),
        sha256=TEXT,
        digest=TEXT,
        sources=many(TEXT),
    )
    fill = one_of([*FillMode, "default"])
    sums = record(size_bytes=COUNT, present_bytes=COUNT, complete=FLAG, trust=one_of(Trust), fill=fill)
    ref = _joined(
        record(
            ref=TEXT,
            revision=TEXT,
            added_at=COUNT,
            pinned=FLAG,
            paused=FLAG,
            previous=many(TEXT),
            blobs=many(_ref("Blob")),
        ),
        sums,
    )
    error = record(error=TEXT, kind=TEXT, exit_code=COUNT)
    error["properties"]["failure"] = one_of(FailureKind)
    job = record(
        job=TEXT,
        kind=one_of(("fill", "verify", "repair")),
        refs=many(TEXT),
        state=one_of(_JOB_STATES),
        progress=ANYTHING,
        result=or_null(ANYTHING),
        error=or_null(_ref("Error")),
    )
    return {
        "Health": health,
        "Status": _joined(schema_of(EngineStatus), health, refs=many(_joined(schema_of(RefStatus), sums))),
        "Blob": blob,
        "Ref": ref,
        "Error": error,
        "Job": job,
        "Update": record(
            ref=TEXT, old_revision=TEXT, new_revision=TEXT, outcome=one_of(Outcome), rolled_back=FLAG
        ),
        "Gc": schema_of(GcReport),
        "VerifyReport": _joined(record(ref=TEXT, ok=FLAG), schema_of(VerifyReport)),
        "Details": _details(),
        "TensorMap": _tensor_map(),
        "ChunkMap": _chunk_map(),
        "InFlight": record(
            requests=many(ANYTHING),
            requests_left_out=COUNT,
            left_behind=COUNT,
            overdue=COUNT,
            fetches=many(schema_of(FetchStatus)),
        ),
        "Stacks": schema_of(Stacks),
    }


def _details() -> Schema:
    model = _joined(schema_of(ModelInfo), record(name=TEXT, files=many(TEXT), unread=COUNT))
    return record(ref=TEXT, revision=TEXT, models=many(model), files=many(schema_of(FileDetails)))


def _tensor_map() -> Schema:
    sizes = {"size_bytes": COUNT, "cached_bytes": COUNT, "verified_bytes": COUNT}
    file = record(path=TEXT, **sizes, header=one_of(HeaderState), problem=TEXT, header_bytes=or_null(COUNT))
    row = record(name=TEXT, dtype=TEXT, offset=COUNT, **sizes)
    file["properties"] |= {"tensors": many(row), "layers": many(row)}
    return record(ref=TEXT, by=one_of(("tensor", "layer")), files=many(file))


def _chunk_map() -> Schema:
    runs = many({"type": "array", "items": COUNT, "minItems": 2, "maxItems": 2})
    file = record(
        path=TEXT,
        blob=TEXT,
        size_bytes=COUNT,
        cached_bytes=COUNT,
        trust=one_of(Trust),
        header_bytes=or_null(COUNT),
        chunk_length=COUNT,
        first_chunk=COUNT,
        chunk_count=COUNT,
        runs=or_null(record(present=runs, quarantined=runs, in_flight=runs)),
    )
    return record(ref=TEXT, files=many(file))


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _content(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _operation(
    name: str,
    summary: str,
    answer: Schema,
    *,
    body: Schema | None = None,
    parameters: tuple[Schema, ...] = (),
) -> Schema:
    operation: Schema = {
        "operationId": name,
        "summary": summary,
        "responses": {
            "200": {"description": "Done.", "content": _content(answer)},
            **{
                code: {"description": text, "content": _content(_ref("Error"))}
                for code, text in _ERRORS.items()
            },
        },
    }
    if parameters:
        operation["parameters"] = list(parameters)
    if body is not None:
        operation["requestBody"] = {"required": True, "content": _content(body)}
    return operation


def _metrics() -> Schema:
    operation = _operation("metrics", "For Prometheus.", TEXT)
    kinds = ("text/plain", "application/openmetrics-text")
    operation["responses"]["200"]["content"] = {kind: {"schema": TEXT} for kind in kinds}
    return operation


def _query(name: str, schema: Schema, *, required: bool = False, text: str = "") -> Schema:
    return {"name": name, "in": "query", "required": required, "schema": schema, "description": text}


def _body(*, also: dict[str, Schema] | None = None, **required: Schema) -> Schema:
    schema = record(**required)
    schema["properties"] |= also or {}
    return schema


def _paths() -> dict[str, dict[str, Schema]]:
    ref = _query("ref", NAME, required=True, text="A ref that is known, in any spelling.")
    wait = _query("wait", NUMBER, text="Seconds; the answer may come earlier.")
    fetch = _query("fetch", FLAG, text="Fetch headers that are not cached yet.")
    by = _query("by", one_of(("tensor", "layer")))
    job = {"name": "job", "in": "path", "required": True, "schema": NAME}
    known = _body(ref=NAME)
    texts = many(TEXT) | {"maxItems": 1000}
    details = (ref, fetch)
    return {
        "/v1/openapi.json": {"get": _operation("describe", "This description.", ANYTHING)},
        "/v1/health": {"get": _operation("health", "Who answers.", _ref("Health"))},
        "/v1/status": {"get": _operation("status", "Everything.", _ref("Status"))},
        "/metrics": {"get": _metrics()},
        "/v1/inflight": {"get": _operation("inflight", "What has not been answered yet.", _ref("InFlight"))},
        "/v1/stacks": {"get": _operation("stacks", "Where tasks and threads are.", _ref("Stacks"))},
        "/v1/refs": {
            "get": _operation("refs", "The refs, each with its blobs.", record(refs=many(_ref("Ref")))),
            "post": _operation(
                "add", "Make a ref known.", _ref("Ref"), body=_body(ref=NAME, also={"refresh": FLAG})
            ),
            "delete": _operation(
                "remove",
                "Forget a ref, and what only it had.",
                record(ref=TEXT, freed_bytes=COUNT),
                body=known,
            ),
        },
        "/v1/update": {"post": _operation("update", "Follow a tag.", _ref("Update"), body=known)},
        "/v1/pin": {
            "post": _operation(
                "pin", "Keep a ref whole, or no longer.", _ref("Ref"), body=_body(ref=NAME, pinned=FLAG)
            )
        },
        "/v1/mode": {
            "post": _operation(
                "mode",
                "How much of a ref is completed in the background.",
                _ref("Ref"),
                body=_body(ref=NAME, mode=one_of([*FillMode, "default"])),
            )
        },
        "/v1/pause": {
            "post": _operation(
                "pause",
                "Hold the background fetching of a ref back, or of all if none is named; or let it go on.",
                record(all_paused=FLAG, refs=many(_ref("Ref"))),
                body=_body(paused=FLAG, also={"ref": NAME}),
            )
        },
        "/v1/reload": {
            "post": _operation(
                "reload",
                "Read the configuration again.",
                record(at_next_start=many(TEXT), added=many(TEXT)),
                body=_body(),
            )
        },
        "/v1/gc": {
            "post": _operation(
                "gc", "Evict what is beyond the limits.", _ref("Gc"), body=_body(also={"dry_run": FLAG})
            )
        },
        "/v1/fill": {
            "post": _operation("fill", "Begin to complete and verify a ref.", _ref("Job"), body=known)
        },
        "/v1/verify": {
            "post": _operation(
                "verify",
                "Begin to hash again what is cached of the refs, of all if none is named.",
                _ref("Job"),
                body=_body(also={"refs": texts, "repair": FLAG}),
            )
        },
        "/v1/repair": {
            "post": _operation(
                "repair",
                "Begin to fetch again what is wrong of the refs, of all if none is named.",
                _ref("Job"),
                body=_body(also={"refs": texts}),
            )
        },
        "/v1/headers": {
            "get": _operation(
                "headers",
                "Wait for the small files and headers of a ref, for 60 seconds at most.",
                record(ref=TEXT, ready=FLAG),
                parameters=(ref, wait),
            )
        },
        "/v1/details": {
            "get": _operation("details", "What headers say.", _ref("Details"), parameters=details)
        },
        "/v1/map": {
            "get": _operation(
                "map", "Where tensors or layers lie.", _ref("TensorMap"), parameters=(*details, by)
            )
        },
        "/v1/chunks": {
            "get": _operation("chunks", "Which chunks are there.", _ref("ChunkMap"), parameters=(ref,))
        },
        "/v1/jobs/{job}": {
            "get": _operation(
                "job", "A job, when it ends or after 30 seconds at most.", _ref("Job"), parameters=(job, wait)
            ),
            "delete": _operation("cancel", "Stop a job.", _ref("Job"), parameters=(job,)),
        },
    }


@functools.cache
def describe() -> Schema:
    """The whole description. Not to be changed: it is made once."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "weightfs control socket",
            "version": weightfs.__version__,
            "description": "HTTP on the Unix socket control.sock of a cache. Sizes in bytes, times in seconds. "
            "Bodies over 64 KiB are refused.",
        },
        "servers": [{"url": "http://weightfs"}],
        "paths": _paths(),
        "components": {"schemas": _schemas()},
    }


if __name__ == "__main__":
    json.dump(describe(), sys.stdout, indent=2)
