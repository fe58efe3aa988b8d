"""A server that speaks vLLM's protocol as `gspo_moe.rollout.servers.vllm` does, on a tiny model, with faults to order.

    python tests/support/stand_in.py HF_FOLDER --port 8000 [--logprobs-mode processed_logprobs] [--routes] [--count 3]

Log-probs are real: transformers' model in float32, each token's whole sequence anew. Weights come by folders and by
broadcasts. `/stand_in/fault` has it fail, or die, which only one in a process of its own can.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import importlib
import io
import json
import os
import pickle
import shutil
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from aiohttp import web
from safetensors.torch import save_file

from gspo_moe.rollout.servers.buckets import TensorHead, empty_bucket, views
from gspo_moe.rollout.servers.transfer_group import ROOT, await_broadcast, join_transfer_group, start_broadcast

NO_LOG_PROB = -9999.0
_LOADING = threading.Lock()  # transformers changes settings of the process while it loads
# What `/stand_in/fault` orders for the next `count` answers; "unavailable" is of every path. With "die", "stall" and
# "drop" it dies, hangs, or answers 503, as it is to take weights for the `count`th time from then on.
FAULTS = (
    "no_log_probs", "too_many_log_probs", "nan", "token", "too_long", "garbage", "cut", "error", "hang", "old_version",
    "unavailable", "no_routes", "load_error", "no_abandon", "die", "stall", "drop",
)  # fmt: skip
SHARED: dict[str, torch.Tensor] = {}  # what stands for a GPU's memory, by the handle that `ipc` sends


class TinyModel:
    """A Qwen3 MoE in a folder as transformers reads it, float32, on the CPU."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        with _LOADING:
            self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.config = self._model.config

    def load(self, folder: Path) -> None:
        self._model = TinyModel(folder)._model

    @torch.no_grad()
    def next(self, token_ids: list[int]) -> torch.Tensor:
        """Logits [V] behind the tokens."""
        logits = self._model(input_ids=torch.tensor([token_ids])).logits
        return logits[0, -1].double()

    @torch.no_grad()
    def routes(self, token_ids: list[int]) -> np.ndarray:
        """[tokens, layers, K]."""
        output = self._model(input_ids=torch.tensor([token_ids]), output_router_logits=True)
        picked = [scores.topk(self.config.num_experts_per_tok).indices for scores in output.router_logits]
        return torch.stack(picked, dim=1).numpy().astype(np.uint8)


@dataclass
class Order:
    fault: str
    count: int


class StandIn:
    """The server's state; `app` serves it. asked: answers that were asked for."""

    def __init__(self, folder: Path, *, logprobs_mode: str = "raw_logprobs", routes: bool = False) -> None:
        self._folder, self._mode, self._routes = folder, logprobs_mode, routes
        self._model = TinyModel(folder)
        self._version = "default"
        self._going = asyncio.Event()
        self._going.set()
        self._pauses = 0
        self._order: Order | None = None
        self._group: tuple[torch.distributed.ProcessGroup, float] | None = None
        self._received: dict[str, torch.Tensor] | None = None
        self.asked = 0

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 26)
        app.middlewares.append(self._unavailable)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/server_info", self._info)
        app.router.add_get("/weight_info", self._weights)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/inference/v1/generate", self._generate)
        app.router.add_post("/pause", self._pause)
        app.router.add_post("/resume", self._resume)
        app.router.add_post("/collective_rpc", self._rpc)
        app.router.add_post("/update_weight_version", self._name_version)
        app.router.add_get("/get_world_size", self._world_size)
        app.router.add_post("/init_weight_transfer_engine", self._join)
        app.router.add_post("/start_weight_update", self._begin)
        app.router.add_post("/update_weights", self._receive)
        app.router.add_post("/finish_weight_update", self._finish)
        app.router.add_post("/stand_in/fault", self._fault)
        app.router.add_get("/stand_in/asked", self._counted)
        return app

    @web.middleware
    async def _unavailable(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if not request.path.startswith("/stand_in/") and self._takes("unavailable"):
            return web.Response(status=503, text="not now")
        found: web.StreamResponse = await handler(request)
        return found

    def _takes(self, fault: str) -> bool:
        """Whether this one was ordered and is due; then it is one less."""
        order = self._order
        if order is None or order.fault != fault or not order.count:
            return False
        order.count -= 1
        return True

    async def _fault(self, request: web.Request) -> web.Response:
        order = Order(**await request.json())
        assert order.fault in FAULTS
        self._order = order
        return web.json_response({})

    async def _counted(self, request: web.Request) -> web.Response:
        return web.json_response({"asked": self.asked})

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, request: web.Request) -> web.Response:
        name, longest = str(self._folder), self._model.config.max_position_embeddings
        return web.json_response({"object": "list", "data": [{"id": name, "root": name, "max_model_len": longest}]})

    async def _info(self, request: web.Request) -> web.Response:
        config = {"logprobs_mode": self._mode, "dtype": "torch.float32", "model": str(self._folder)}
        aux = {"enable_return_routed_experts": self._routes}
        return web.json_response({"vllm_config": {"model_config": config, "aux_output_config": aux}})

    async def _weights(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": self._version})

    async def _tokenize(self, request: web.Request) -> web.Response:
        from gspo_moe.config.model import TokenizerConfig
        from gspo_moe.data.tokenizers import own_tokenizer

        tokenizer = own_tokenizer(TokenizerConfig(), self._folder)
        if tokenizer is None:
            return web.json_response({"error": {"message": "no tokenizer"}}, status=400)
        return web.json_response({"tokens": tokenizer.encode((await request.json())["prompt"])})

    async def _pause(self, request: web.Request) -> web.Response:
        assert request.query["mode"] == "abort"
        self._going.clear()
        self._pauses += 1
        return web.json_response({"status": "paused"})

    async def _resume(self, request: web.Request) -> web.Response:
        self._going.set()
        return web.json_response({"status": "resumed"})

    async def _rpc(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body["method"] == "abandon_update":
            if self._takes("no_abandon"):
                return web.json_response({"error": {"message": "no such method"}}, status=400)
            self._received = None
            return web.json_response({"results": [None]})
        assert body["method"] == "load_folder"
        folder, version = body["args"]
        await self._falter()
        if self._takes("load_error"):
            return web.json_response({"error": {"message": "ordered"}}, status=500)
        self._model.load(Path(folder))
        return web.json_response({"results": [{"version": version}]})

    async def _falter(self) -> None:
        order = self._order
        if order is None or order.fault not in ("die", "stall", "drop"):
            return
        order.count -= 1
        if order.count == 0:
            if order.fault == "die":
                os._exit(9)
            if order.fault == "drop":
                raise web.HTTPServiceUnavailable
            await asyncio.sleep(3600)

    async def _world_size(self, request: web.Request) -> web.Response:
        return web.json_response({"world_size": 1})

    async def _join(self, request: web.Request) -> web.Response:
        info = (await request.json())["init_info"]
        if "packed" in info:
            return web.json_response({})
        if self._group is not None:
            torch.distributed.destroy_process_group(self._group[0])
        group = await asyncio.to_thread(
            join_transfer_group,
            info["address"],
            info["port"],
            rank=info["rank_offset"],
            world_size=info["world_size"],
            name=info["group_name"],
            backend=info["backend"],
            timeout_seconds=info["timeout_seconds"],
        )
        self._group = group, info["timeout_seconds"]
        return web.json_response({})

    async def _begin(self, request: web.Request) -> web.Response:
        if self._received is not None:
            return web.json_response({"error": {"message": "already active"}}, status=500)
        self._received = {}
        return web.json_response({})

    async def _receive(self, request: web.Request) -> web.Response:
        info = (await request.json())["update_info"]
        shared = "ipc_handles_pickled" in info
        parts = zip(info["names"], info["dtype_names" if shared else "dtypes"], info["shapes"], strict=True)
        heads = [TensorHead(name, dtype, tuple(shape)) for name, dtype, shape in parts]
        assert self._received is not None
        await self._falter()
        if shared:
            (handle,) = pickle.loads(base64.b64decode(info["ipc_handles_pickled"]))
            bucket = SHARED[handle][: sum(info["tensor_sizes"])].clone()
            self._received |= zip(info["names"], views(bucket, heads), strict=True)
            return web.json_response({})
        assert self._group is not None
        group, seconds = self._group
        bucket = empty_bucket(heads, torch.device("cpu"))
        work = start_broadcast(bucket, group, ROOT)
        await asyncio.to_thread(await_broadcast, work, group, seconds)
        self._received |= zip(info["names"], views(bucket, heads), strict=True)
        return web.json_response({})

    async def _finish(self, request: web.Request) -> web.Response:
        assert self._received is not None
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(self._folder / "config.json", folder)
            save_file(self._received, Path(folder) / "model.safetensors", {"format": "pt"})
            self._model.load(Path(folder))
        self._received, self._version = None, (await request.json())["weight_version"]
        return web.json_response({})

    async def _name_version(self, request: web.Request) -> web.Response:
        self._version = (await request.json())["new_version"]
        return web.json_response({"success": True, "new_version": self._version})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked += 1
        await self._going.wait()
        if self._takes("hang"):
            await asyncio.sleep(3600)
        if self._takes("error"):
            return web.json_response({"error": {"message": "ordered"}}, status=500)
        prompt, params = body["token_ids"], body["sampling_params"]
        if max(prompt) >= self._model.config.vocab_size:
            return web.json_response({"error": {"message": "token outside of the vocabulary"}}, status=400)
        if len(prompt) >= self._model.config.max_position_embeddings:
            return web.json_response({"error": {"message": "longer than the context"}}, status=400)
        choice = await self._sampled(prompt, params)
        return await self._damaged(request, {"model": str(self._folder), "choices": [choice]})

    async def _sampled(self, prompt: list[int], params: dict[str, Any]) -> dict[str, Any]:
        generator = torch.Generator()
        if "seed" in params:
            generator.manual_seed(params["seed"])
        ids, content, finish, pauses = list[int](), list[dict[str, Any]](), "length", self._pauses
        room = self._model.config.max_position_embeddings - len(prompt)
        while len(ids) < min(params["max_tokens"], room):
            token, log_prob = pick(self._model.next(prompt + ids), params, self._mode, generator)
            ids.append(token)
            content.append({"token_id": token, "logprob": log_prob})
            if token in params["stop_token_ids"]:
                finish = "stop"
                break
            await asyncio.sleep(0)  # others may be asked, or pause
            if self._pauses != pauses:
                finish = "abort"
                break
        routes = None
        if self._routes:
            routes = in_base64(self._model.routes(prompt + ids)[:-1])
        spans = [{"version": self._version, "start": 0, "end": len(ids)}]
        return {
            "index": 0, "finish_reason": finish, "token_ids": ids, "logprobs": {"content": content},
            "routed_experts": routes, "weight_versions": spans,
        }  # fmt: skip

    async def _damaged(self, request: web.Request, answer: dict[str, Any]) -> web.StreamResponse:
        choice = answer["choices"][0]
        if self._takes("no_log_probs"):
            choice["logprobs"] = None
        if self._takes("too_many_log_probs"):
            choice["logprobs"]["content"].append(choice["logprobs"]["content"][-1])
        if self._takes("nan"):
            choice["logprobs"]["content"][-1]["logprob"] = NO_LOG_PROB
        if self._takes("token"):
            choice["token_ids"][0] = self._model.config.vocab_size
        if self._takes("too_long"):
            for one in (choice["token_ids"], choice["logprobs"]["content"]):
                one += one[-1:] * 1000
        if self._takes("old_version"):
            choice["weight_versions"][0]["version"] = "0"
        if self._takes("no_routes"):
            choice["routed_experts"] = None
        text = json.dumps(answer)
        if self._takes("garbage"):
            return web.Response(text=text[:-20], content_type="application/json")
        if self._takes("cut"):
            response = web.StreamResponse(
                headers={"Content-Type": "application/json", "Content-Length": str(len(text))}
            )
            await response.prepare(request)
            await response.write(text[: len(text) // 2].encode())
            assert request.transport is not None
            request.transport.abort()
            return response
        return web.Response(text=text, content_type="application/json")


def pick(logits_V: torch.Tensor, params: dict[str, Any], mode: str, generator: torch.Generator) -> tuple[int, float]:
    """A token and its log-prob as vLLM's `mode` has it."""
    raw_V = logits_V.log_softmax(0)
    temperature = params["temperature"]
    if temperature == 0.0:
        token = int(raw_V.argmax())
        return token, float(raw_V[token])
    scaled_V = logits_V / temperature
    if params["top_k"]:
        scaled_V = scaled_V.masked_fill(scaled_V < scaled_V.topk(params["top_k"]).values[-1], -torch.inf)
    if params["top_p"] < 1.0:
        probs_V, order_V = scaled_V.softmax(0).sort(descending=True)
        cut = order_V[probs_V.cumsum(0) - probs_V >= params["top_p"]]
        scaled_V = scaled_V.index_fill(0, cut, -torch.inf)
    processed_V = scaled_V.log_softmax(0)
    token = int(torch.multinomial(processed_V.exp(), 1, generator=generator))
    return token, float((raw_V if mode == "raw_logprobs" else processed_V)[token])


def in_base64(array: np.ndarray) -> str:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return base64.b64encode(buffer.getvalue()).decode()


class Running:
    """A stand-in in a thread of this process, on a port of its own; `stop` drops its connections."""

    def __init__(self, folder: Path, port: int = 0, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.server, self._runner, self.port = self._do(self._start(folder, port, options))
        self.url = f"http://127.0.0.1:{self.port}"

    def order(self, fault: str, count: int = 1) -> None:
        self.server._order = Order(fault, count)

    def stop(self) -> None:
        self._do(self._runner.cleanup())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _start(self, folder: Path, port: int, options: dict[str, Any]) -> tuple[StandIn, web.AppRunner, int]:
        server = StandIn(folder, **options)
        runner = web.AppRunner(server.app(), shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port)
        await site.start()
        return server, runner, runner.addresses[0][1]


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("folder", type=Path)
    options.add_argument("--port", type=int, required=True)
    options.add_argument("--logprobs-mode", default="raw_logprobs")
    options.add_argument("--routes", action="store_true")
    options.add_argument(
        "--count", type=int, default=1, help="servers, each a process, on as many ports one behind the other"
    )
    given = options.parse_args()
    torch.set_num_threads(1)
    importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")  # once for all of them

    async def app() -> web.Application:
        return StandIn(given.folder, logprobs_mode=given.logprobs_mode, routes=given.routes).app()

    number = next((number for number in range(1, given.count) if os.fork() == 0), 0)
    web.run_app(app(), host="127.0.0.1", port=given.port + number, print=None)


if __name__ == "__main__":
    main()
