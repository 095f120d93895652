"""Has a running server serve another version, without a restart, a failed request or a mixture of versions.

The ensemble `guarded` names the version of every model behind it. So the versions to come are loaded beside those that
are served, then the ensemble is exchanged, which Triton does in one step, then the old versions go.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from google.protobuf import json_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from client.api import GuardedClient
from detector.errors import AccessDeniedError, ServerError
from detector.serving import BEHIND, CONTROL_KEY, IDENTITY_KEY, SENTINEL, layout_of

ENSEMBLE = "guarded"
_POLL_SECONDS = 0.05
_LONGEST_REQUEST_SECONDS = 60.0


def control_headers(control_token: str | None) -> dict[str, str]:
    """Return the headers that let a client control the models; none without a token."""
    return {} if control_token is None else {f"triton-grpc-protocol-{CONTROL_KEY}": control_token}


class ModelControl:
    """Controls which version a server serves.

    Args:
        client: a client with `control_headers` among its headers, and a deadline that is long enough to load a model.
    """

    def __init__(self, client: GuardedClient) -> None:
        self._client = client

    def check_access(self) -> None:
        """Check, before anything is changed, that the server lets us control its models; raises as `states` does."""
        self.states()

    def states(self) -> dict[tuple[str, str], str]:
        """Return the state of every version of every model that the server knows, such as READY, by name and number.

        Raises:
            AccessDeniedError: it asks for another control token.
            ServerError: it does not answer.
        """
        try:
            index: Any = self._client.ask(
                ENSEMBLE, lambda triton, **options: triton.get_model_repository_index(**options)
            )
        except AccessDeniedError as error:
            raise AccessDeniedError(
                f"the server does not let us control its models ({error}): the control token is missing or wrong. "
                "`stripwire serve` leaves it where the same user on the same machine finds it; otherwise give the one "
                "that the server was started with, --control-token or STRIPWIRE_CONTROL_TOKEN"
            ) from error
        return {(model.name, model.version): model.state for model in index.models}

    def served(self) -> tuple[str, dict[str, int], str]:
        """Return the version that the server serves, the version of each model behind it, and its identity.

        Raises:
            ServerError: the server does not answer, or its ensemble does not name the versions behind it.
        """
        metadata = self._client.ask(ENSEMBLE, lambda triton, **options: triton.get_model_metadata(ENSEMBLE, **options))
        config = self._config(ENSEMBLE)
        models = {step.model_name: int(step.model_version) for step in config.ensemble_scheduling.step}
        if len(metadata.versions) != 1 or min(models.values(), default=-1) < 1:
            raise ServerError(
                f"{ENSEMBLE}: the server has versions {list(metadata.versions)}, made of {models}, expected one that "
                "names its models' versions; was the server started on a repository of this Stripwire?"
            )
        return metadata.versions[0], models, config.parameters[IDENTITY_KEY].string_value

    def check_serves(self, versions: Mapping[str, Any]) -> tuple[str, dict[str, int]]:
        """Check, before anything is changed, that the server serves a repository.

        Args:
            versions: of the repository, as its manifest has them.

        Returns:
            The version that it serves, and the version of each model behind it.

        Raises:
            ServerError: it serves another one, or does not answer.
        """
        version, models, identity = self.served()
        if versions.get(version, {}).get("identity") != identity:
            raise ServerError(
                f"the server serves another repository (its version {version}), and was not touched; expected one that "
                "serves this repository. Is the address right?"
            )
        return version, models

    def switch(self, version: str, versions: Mapping[str, Any]) -> bool:
        """Have the server serve another version of the repository that lies before it.

        Requests that run meanwhile are answered by the old version or by the new one as a whole, and
        `model_version` in the response says by which.

        Args:
            version: number of the version, the active one of the repository on the server's disk.
            versions: of that repository, as its manifest has them.

        Returns:
            Whether there was anything to do.

        Raises:
            AccessDeniedError: the server asks for another control token.
            ServerError: the server serves another repository, or the version could not be loaded; the message says what
                the server serves then.
        """
        states = self.states()
        old, old_models = self.check_serves(versions)
        if old == version:
            return False
        held, models, before = dict(old_models), versions[version]["models"], self._config(ENSEMBLE)
        beside = str(versions[old]["models"][SENTINEL])
        if states.get((SENTINEL, beside)) == "READY":
            held[SENTINEL] = int(beside)
        needed = {*BEHIND[layout_of(models)], *held.keys() & {SENTINEL}}
        # What comes, by name: the version of it that is held, None where the layout of `version` brings it along.
        renewed = {name: held.get(name) for name in sorted(needed) if held.get(name) != models[name]}
        try:
            for name, number in renewed.items():
                self._load(name, None if number is None else {number, models[name]})
            self._exchange(version)
        except ServerError as error:
            goes_on = self._went_on(before, old, renewed)
            if goes_on != version:  # else the answer alone was lost
                after = "serves nothing now: start it again" if goes_on is None else f"goes on with version {goes_on}"
                raise ServerError(
                    f"version {version} could not be put in place of {old}, and the server {after}: {error}"
                ) from error
        with suppress(ServerError):  # it is done; what stays of the old version goes when it is switched next
            if self._is_idle(old):
                self._hold_only({name: models[name] for name in renewed} | dict.fromkeys(held.keys() - needed))
        return True

    def reload(self, model: str) -> None:
        """Unload one model and load it as it ran: what heals a model whose process died, which Triton calls ready.

        Requests fail meanwhile, as they did before. A model that is not loaded is loaded as its files say.

        Raises:
            AccessDeniedError: the server asks for another control token.
            ServerError: the model could not be loaded; it may be gone from the server then.
        """
        self.check_access()
        config = None
        with suppress(ServerError):  # it is not loaded
            config = json_format.MessageToJson(self._config(model), preserving_proto_field_name=True)
        if config is not None:
            self._client.ask(model, lambda triton, **options: triton.unload_model(model, **options))
        self._client.ask(model, lambda triton, **options: triton.load_model(model, config=config, **options))

    def _went_on(self, before: ModelConfig, old: str, models: Mapping[str, int | None]) -> str | None:
        """Return what the server serves after a failure, put back to what it was if need be; None for nothing."""
        with suppress(ServerError):  # what matters is the first error
            return self._tidied(old, models)
        with suppress(ServerError):
            config = json_format.MessageToJson(before, preserving_proto_field_name=True)
            self._client.ask(ENSEMBLE, lambda triton, **options: triton.load_model(ENSEMBLE, config=config, **options))
            return self._tidied(old, models)
        return None

    def _tidied(self, old: str, models: Mapping[str, int | None]) -> str:
        """Return the version that is served; if it is the old one, its models alone stay loaded."""
        version, _, _ = self.served()
        if version == old:
            with suppress(ServerError):
                self._hold_only(models)
        return version

    def _hold_only(self, models: Mapping[str, int | None]) -> None:
        """Have the server hold one version of each model, by name, and none of a model whose version is None."""
        for name, number in models.items():
            if number is None:
                self._client.ask(name, lambda triton, name=name, **options: triton.unload_model(name, **options))
            else:
                self._load(name, {number})

    def _exchange(self, version: str) -> None:
        """Load the ensemble as its files say."""
        self._load(ENSEMBLE)
        now, _, _ = self.served()
        if now != version:
            raise ServerError(f"the server came up with version {now}; does it serve another repository?")

    def _load(self, model: str, versions: Iterable[int] | None = None) -> None:
        """Load a model as its files say, or as it runs now but with other versions (which keeps the server's mode)."""
        config = None
        if versions is not None:
            running = self._config(model)
            running.version_policy.specific.versions[:] = sorted(versions)
            config = json_format.MessageToJson(running, preserving_proto_field_name=True)
        self._client.ask(model, lambda triton, **options: triton.load_model(model, config=config, **options))

    def _config(self, model: str) -> ModelConfig:
        response = self._client.ask(model, lambda triton, **options: triton.get_model_config(model, **options))
        return response.config

    def _is_idle(self, version: str) -> bool:
        """Wait until the last request to a version of the ensemble is answered: its models must stay that long."""
        give_up_at = time.monotonic() + _LONGEST_REQUEST_SECONDS
        while self.states().get((ENSEMBLE, version)) not in (None, "UNAVAILABLE"):
            if time.monotonic() > give_up_at:
                return False
            time.sleep(_POLL_SECONDS)
        return True
