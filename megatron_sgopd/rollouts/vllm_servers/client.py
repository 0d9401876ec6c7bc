"""One vLLM server over HTTP: token ids in, token ids and log-probs out, and the weights' protocol.

Every call raises `EngineDown` when the server is gone or broken (asking again may help, after a
restart) and `EngineRefused` when it answers that the request is wrong (asking again cannot).
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from typing import Any

import httpx2

from megatron_sgopd.rollouts.vllm_servers.weight_wire import DESCRIPTION
from megatron_sgopd.types import Completion, Request

KEEP_ALIVE_S = 3.0  # below the server's 5 s: it must not be the one to hang up
MODEL = "policy"  # the name our servers serve their model under
NEVER = -100.0  # added to a logit, the least that vLLM takes: its probability is 0 in fp32


class EngineDown(ConnectionError):
    """The server does not answer, or answers that it is broken."""


class EngineRefused(ValueError):
    """The server answers, and refuses."""


class VllmClient:
    """Thread-safe; `max_connections` calls at once, more wait. `never_sampled`: token ids."""

    def __init__(
        self,
        url: str,
        key: str,
        *,
        max_connections: int = 256,
        timeout_s: float = 3600.0,
        never_sampled: Iterable[int] = (),
        lost_after_s: float = 120.0,
    ) -> None:
        """`lost_after_s`: a host that is gone without a word counts as down."""
        self.url = url.rstrip("/")
        self._bias = dict.fromkeys(map(str, never_sampled), NEVER)
        self._http = httpx2.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"},
            timeout=httpx2.Timeout(timeout_s, connect=10.0),
            transport=httpx2.HTTPTransport(
                limits=httpx2.Limits(
                    max_connections=max_connections + 8,
                    max_keepalive_connections=64,
                    keepalive_expiry=KEEP_ALIVE_S,
                ),
                trust_env=False,
                socket_options=_keep_alive(lost_after_s),
            ),
            trust_env=False,  # no proxy between a trainer and its engines
        )

    # -- generation --------------------------------------------------------------------------------

    def complete(self, request: Request) -> Completion:
        """One completion; the engine names the version of the weights that sampled it."""
        answer = self._generate(
            request.prompt_token_ids,
            max_tokens=request.max_new_tokens,
            temperature=request.temperature,
            seed=request.seed % 2**31,
            stop_token_ids=list(request.stop_token_ids),
            top_p=request.top_p,
            top_k=request.top_k,
            min_p=request.min_p,
            logprobs=0,
        )
        choice = answer["choices"][0]
        content = choice["logprobs"]["content"]
        token_ids = tuple(choice["token_ids"])
        if len(content) != len(token_ids) or choice["finish_reason"] not in ("stop", "length"):
            raise EngineDown(
                f"{self.url} gave {len(token_ids)} tokens with {len(content)} log-probs, finish "
                f"reason {choice['finish_reason']!r}: the request was cut short"
            )
        return Completion(
            token_ids=token_ids,
            logprobs=tuple(entry["logprob"] for entry in content),
            finish_reason="stop" if choice["finish_reason"] == "stop" else "length",
            policy_version=_version_of(choice),
            seed=request.seed,
        )

    def next_logprob(self, prefix: Sequence[int], token: int, temperature: float) -> float:
        """log p(token | prefix) at a sampling temperature, by the sampler that makes rollouts."""
        # The answer has as many entries as were asked for, and the sampled token's comes first:
        # a second one is asked for so that the token's own is not the one left out.
        asked = [token, int(token == 0)]
        answer = self._generate(
            prefix, max_tokens=1, temperature=temperature, logprobs=2, logprob_token_ids=asked
        )
        entry = answer["choices"][0]["logprobs"]["content"][0]
        found = [e["logprob"] for e in entry["top_logprobs"] if e["token_id"] == token]
        return float(found[0])

    def _generate(self, token_ids: Sequence[int], **sampling: Any) -> dict[str, Any]:
        # The recipe's stop ids are all that ends a completion: not the model's own EOS beside them.
        fixed: dict[str, Any] = {"ignore_eos": True, "detokenize": False, "top_p": 1.0, "top_k": 0}
        if self._bias:
            fixed["logit_bias"] = self._bias
        body = {
            "model": MODEL,
            "token_ids": list(token_ids),
            "sampling_params": {**fixed, **sampling},
        }
        return self._call("POST", "/inference/v1/generate", body)

    # -- state -------------------------------------------------------------------------------------

    def is_ready(self) -> bool:
        try:
            return self._http.get("/health", timeout=5.0).status_code == 200
        except httpx2.HTTPError:
            return False

    def is_responding(self, timeout_s: float) -> bool:
        """Tells whether the process that computes answers; /health asks the HTTP one alone."""
        try:
            return self._http.get("/is_sleeping", timeout=timeout_s).is_success
        except httpx2.HTTPError:
            return False

    def describe(self) -> dict[str, Any]:
        """model, model_type, vocab_size, max_model_len, version, world_size, … of the server."""
        return dict(self._call("GET", DESCRIPTION))

    def policy_version(self) -> int:
        """Asks for the version of the weights that it holds; -1 before the first push."""
        return _number(self._call("GET", "/weight_info")["weight_version"])

    # -- weights -----------------------------------------------------------------------------------

    def init_transfer(self, info: dict[str, Any]) -> None:
        self._call("POST", "/init_weight_transfer_engine", {"init_info": info})

    def start_update(self) -> None:
        """New requests wait, those under way are finished; then the update begins."""
        self._call("POST", "/pause?mode=wait&clear_cache=false")  # `finish_update` clears it
        self._call("POST", "/start_weight_update")

    def update(self, entries: list[list[Any]], source: dict[str, Any]) -> None:
        self._call(
            "POST", "/update_weights", {"update_info": {"entries": entries, "source": source}}
        )

    def finish_update(self, policy_version: int) -> None:
        """Names the new weights, forgets what the old ones computed, and lets requests in."""
        self._call("POST", "/finish_weight_update", {"weight_version": str(policy_version)})
        self.reset_prefix_cache()
        self._call("POST", "/resume")

    def reset_prefix_cache(self) -> None:
        """Empties the prefix cache: long prompts would go on from keys of the old weights."""
        self._call("POST", "/reset_prefix_cache")

    def sleep(self, *, keep_weights: bool) -> None:
        """Gives the GPU's memory up; weights go to host memory, or are forgotten."""
        self._call("POST", f"/sleep?level={1 if keep_weights else 2}")

    def wake_up(self) -> None:
        self._call("POST", "/wake_up")

    def close(self) -> None:
        self._http.close()

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        try:
            response = self._http.request(method, path, json=body)
        except httpx2.HTTPError as error:
            raise EngineDown(
                f"the engine at {self.url} does not answer {path.split('?')[0]} "
                f"({type(error).__name__}: {error})"
            ) from error
        if response.is_success:
            return response.json() if response.content else None
        message = (
            f"{self.url}{path.split('?')[0]} answers {response.status_code}: {_reason(response)}"
        )
        if response.status_code == 401:
            raise EngineRefused(
                f"{message}. It was started with another key: put its key into the environment "
                "variable that rollout.vllm.api_key_variable names"
            )
        if response.status_code == 404 and path not in ("/health",):
            message += ". A server for training is started with `sgopd serve RECIPE`"
        raise (EngineDown if response.status_code >= 500 else EngineRefused)(message)


def _keep_alive(lost_after_s: float) -> list[tuple[int, int, int]]:
    """The kernel asks a silent peer a few times, and breaks the connection to a lost one."""
    asks = 4
    pause = max(1, round(lost_after_s / (2 * asks)))
    return [
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, pause * asks),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, pause),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, asks),
    ]


def _reason(response: httpx2.Response) -> str:
    try:
        error = response.json().get("error", response.text)
    except ValueError:
        return response.text[:500]
    return str(error.get("message", error) if isinstance(error, dict) else error)[:500]


def _version_of(choice: dict[str, Any]) -> int:
    """The oldest weights that a completion was sampled with."""
    spans = choice.get("weight_versions") or []
    return min((_number(span["version"]) for span in spans), default=-1)


def _number(version: str) -> int:
    return int(version) if version.lstrip("-").isdigit() else -1  # vLLM's own name is "default"
