"""Runs a copy of a RayJob that serves as a template, and ends as it does: what a CronJob's pod does with its life.

    run_rayjob.py pia-ray-catalog --name pia-ray-nightly-29384720-run

While the pod lives, `concurrencyPolicy: Forbid` starts no second one. A pod that is started again finds the copy by its
name and follows it. The copy belongs to the Kubernetes Job named by JOB_NAME and JOB_UID, and is removed with it.
Exits with 0 when the run has succeeded, 1 when it has failed, 2 when it could not be started or followed.
"""

from __future__ import annotations

import argparse
import os
import ssl
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import httpx2

IN_POD: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
KEPT: Final = ("labels", "annotations")
REFUSALS: Final = 20
"""Answers such as 403, one after the other, after which it gives up, because waiting gives no rights back."""


def main(words: Sequence[str]) -> int:
    """Runs the copy; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("template", metavar="TEMPLATE", help="name of the suspended RayJob")
    parser.add_argument("--name", required=True, metavar="NAME", help="of the copy, and of no Job; 47 characters")
    parser.add_argument(
        "--poll-s", type=float, default=15.0, metavar="S", help="between requests (default: %(default)s)"
    )
    args = parser.parse_args(words)
    try:
        with connect() as api:
            start(api, args.template, args.name)
            return follow(api, args.name, poll_s=args.poll_s)
    except (httpx2.HTTPError, OSError, KeyError) as error:
        print(f"run_rayjob.py: {type(error).__name__}: {error}", file=sys.stderr)
        return 2


def connect() -> httpx2.Client:
    """The Kubernetes API as this pod's ServiceAccount sees it; KUBERNETES_API names another, such as kubectl proxy."""
    namespace = os.environ.get("NAMESPACE") or (IN_POD / "namespace").read_text()
    path = f"/apis/ray.io/v1/namespaces/{namespace}/rayjobs/"
    if (url := os.environ.get("KUBERNETES_API")) is not None:
        return httpx2.Client(base_url=url + path, timeout=30)
    host = os.environ["KUBERNETES_SERVICE_HOST"]
    server = f"https://{f'[{host}]' if ':' in host else host}:{os.environ['KUBERNETES_SERVICE_PORT']}"
    trusted = ssl.create_default_context(cafile=str(IN_POD / "ca.crt"))
    return httpx2.Client(
        base_url=server + path,
        # Read for each request: tokens of pods expire within the hour and are renewed in place.
        auth=_with_token,
        transport=httpx2.HTTPTransport(verify=trusted, retries=5),  # a new pod's network may take some seconds
        timeout=30,
    )


def start(api: httpx2.Client, template: str, name: str) -> None:
    """Creates the copy, unless a pod before this one has."""
    answer = api.get(template)
    answer.raise_for_status()
    found = answer.json()
    metadata = {key: value for key, value in found["metadata"].items() if key in KEPT}
    metadata["annotations"] = {
        key: value for key, value in metadata.get("annotations", {}).items() if not key.startswith("kubectl.")
    }
    if "JOB_UID" in os.environ:
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": os.environ["JOB_NAME"], "uid": os.environ["JOB_UID"]}
        metadata["ownerReferences"] = [owner]
    copy = {
        "apiVersion": found["apiVersion"],
        "kind": found["kind"],
        "metadata": {**metadata, "name": name},
        "spec": {**found["spec"], "suspend": False},
    }
    answer = api.post("", json=copy)
    if answer.status_code == 409:
        print(f"{name} is there already: following it", flush=True)
        return
    answer.raise_for_status()
    print(f"{name} is created from {template}", flush=True)


def follow(api: httpx2.Client, name: str, *, poll_s: float) -> int:
    """Waits for the copy's end, also while the API does not answer; 0 if it has succeeded, 2 if refused, else 1."""
    shown, refusals = "", 0
    while True:
        status: dict[str, Any] = {}
        try:
            answer = api.get(name)
            if answer.status_code == 404:
                print(f"{name} was deleted", flush=True)
                return 1
            is_refused = answer.is_client_error and answer.status_code not in (408, 429)
            refusals = refusals + 1 if is_refused else 0
            if refusals == REFUSALS:
                print(f"{name} goes on, but may not be followed: {answer.status_code} {answer.text}", file=sys.stderr)
                return 2
            status = answer.raise_for_status().json().get("status", {})
        except httpx2.HTTPError as error:
            print(f"the API does not answer: {error}", flush=True)
        state = str(status.get("jobDeploymentStatus", ""))
        line = " ".join(filter(None, (state, str(status.get("jobStatus", "")), str(status.get("message", "")))))
        if line and line != shown:
            print(f"{name}: {line}", flush=True)
            shown = line
        if state in ("Complete", "Failed"):
            return 0 if state == "Complete" and status.get("jobStatus") == "SUCCEEDED" else 1
        time.sleep(poll_s)


def _with_token(request: httpx2.Request) -> httpx2.Request:
    request.headers["Authorization"] = f"Bearer {(IN_POD / 'token').read_text()}"
    return request


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
