"""Checks manifests against the typed models of Kubeflow, which hold those of JobSet and of Kubernetes itself.

The models refuse wrong types, but drop keys that they do not know, and put an empty text for some that are missing; a
manifest is therefore compared with what comes back. What the cluster's own rules (CEL, webhooks) say, it says itself
when the object is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from vqscale.errors import UserError

INSTALL = "pip install -c constraints.txt -e '.[kubernetes]'"


def check(manifest: dict[str, Any]) -> None:
    """Check a JobSet or TrainJob.

    Raises:
        UserError: a field has the wrong type, is missing or unknown; or the models are not installed.
    """
    where = f"manifest of {manifest['metadata']['name']}"
    try:
        kept = _model(manifest["kind"]).from_dict(manifest).to_dict()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(f"{first['msg']} ({error.title}: {_path(first['loc'])})", where=where) from None
    fault = next(_faults(manifest, kept), None)
    if fault:
        raise UserError(fault, where=where)


def _model(kind: str) -> Any:
    try:
        from kubeflow_trainer_api import models
    except ImportError:
        raise UserError("its models are not installed", where="Kubernetes", mend=INSTALL) from None
    return {"JobSet": models.JobsetV1alpha2JobSet, "TrainJob": models.TrainerV1alpha1TrainJob}[kind]


def _faults(given: Any, kept: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """What a manifest has and the model has dropped, or what it lacks and the model has filled with nothing."""
    if isinstance(given, dict):
        known = kept if isinstance(kept, dict) else {}
        yield from (f"field {_path((*path, key))} is missing" for key in known if key not in given and known[key] == "")
        for key, value in given.items():
            if key in known:
                yield from _faults(value, known[key], (*path, key))
            else:
                yield f"unknown field {_path((*path, key))}"
    elif isinstance(given, list):
        for number, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from _faults(one, other, (*path, str(number)))


def _path(parts: tuple[Any, ...]) -> str:
    return ".".join(map(str, parts))
