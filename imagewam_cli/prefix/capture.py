"""Record and replay the keys and values of a model's attention calls, without touching the model's code.

Under the native attention backends, every diffusers denoiser calls `torch.nn.functional.scaled_dot_product_attention`.
Forward hooks on the named attention modules track which layer is running, and a torch function mode intercepts its
call. A recorded key is therefore post-norm and post-RoPE, exactly as the softmax sees it, whatever the architecture.

`record` keeps K and V of one forward pass. `replay` prepends recorded K and V to those of a forward pass, so that
tokens attend jointly with a prefix that was computed before. `observe` only reads the results of
any torch functions inside named modules, such as the weights of an attention that calls softmax directly.

Other attention backends bypass the intercepted call, so a layer without a call is an error. Models with compiled blocks
can be recorded too: the recorder breaks their graphs.

Several threads may use one model. Captures of one model run one after the other (`exclusive`), and a capture ignores
the forward passes of other threads.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from imagewam_cli.errors import CaptureError
from imagewam_cli.prefix.kv import LayerKV

_POSITIONAL = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
"""Arguments of `scaled_dot_product_attention` that may be positional, in order."""
_HINT = 'use the native attention backend: model.set_attention_backend("native")'
SOFTMAX: tuple[Callable[..., Any], ...] = (torch.softmax, F.softmax, torch.Tensor.softmax)
"""The functions that compute a softmax in torch."""


_locks: weakref.WeakKeyDictionary[nn.Module, contextlib.AbstractContextManager[bool]] = weakref.WeakKeyDictionary()
"""Model -> its lock. Not an attribute of the model, so that models can still be copied and pickled."""
_locks_guard = threading.Lock()


def _new_locks() -> None:
    """Forget all locks: in a forked process, the threads that hold them do not exist."""
    global _locks, _locks_guard
    _locks, _locks_guard = weakref.WeakKeyDictionary(), threading.Lock()


os.register_at_fork(after_in_child=_new_locks)


@dataclass
class Recording:
    """Result of `record`: module name -> keys and values, in call order."""

    layers: dict[str, LayerKV] = field(default_factory=dict)


class _Finished(Exception):  # noqa: N818 - not an error: used to leave a forward pass after the last requested layer
    pass


@contextlib.contextmanager
def exclusive(model: nn.Module) -> Iterator[None]:
    """Wait until no other thread is in such a block for the same model. A thread may nest blocks."""
    with _locks_guard:
        lock = _locks.setdefault(model, threading.RLock())
    with lock:
        yield


@contextlib.contextmanager
def record(model: nn.Module, layers: Sequence[str], *, stop_after_last: bool = False) -> Iterator[Recording]:
    """Record K and V of the attention modules named `layers` while the model runs once inside the `with` block.

    stop_after_last: leave the forward pass as soon as the last layer is recorded. The rest (its MLP, the output head)
        is never computed, and the code after the forward pass in the `with` block does not run.

    Raises:
        CaptureError: a layer made no attention call, or more than one.
    """
    recording = Recording()
    remaining = set(layers)

    def visit(name: str, q: Tensor, k: Tensor, v: Tensor, call: _AttentionCall) -> Tensor:
        if name in recording.layers:
            raise CaptureError(
                f"layer {name!r} attends more than once in a forward pass", "name its inner modules instead"
            )
        recording.layers[name] = LayerKV(k.transpose(1, 2), v.transpose(1, 2))  # (B, H, P, D) -> (B, P, H, D)
        remaining.discard(name)
        if stop_after_last and not remaining:
            raise _Finished
        return call(q, k, v)

    try:
        with _intercept(model, layers, visit):
            yield recording
    except _Finished:  # it propagates through the model and ends the caller's `with` block early
        pass
    if remaining:
        raise CaptureError(f"no attention call was intercepted in {_abbreviate(sorted(remaining))}", _HINT)


@contextlib.contextmanager
def replay(model: nn.Module, layers: Mapping[str, LayerKV], valid: Tensor | None = None) -> Iterator[None]:
    """Prepend recorded K and V to those of the named layers while the model runs inside the `with` block.

    valid: bool (B, P); recorded tokens marked False are masked.

    Raises:
        CaptureError: a named layer made no attention call.
    """
    unseen = set(layers)

    def visit(name: str, q: Tensor, k: Tensor, v: Tensor, call: _AttentionCall) -> Tensor:
        unseen.discard(name)
        prefix = layers[name]
        k = torch.cat([prefix.k.transpose(1, 2), k], dim=2)
        v = torch.cat([prefix.v.transpose(1, 2), v], dim=2)
        return call(q, k, v, mask=_with_prefix_mask(call.mask, valid, q, k))

    with _intercept(model, list(layers), visit):
        yield
    if unseen:
        raise CaptureError(f"no attention call was intercepted in {_abbreviate(sorted(unseen))}", _HINT)


@contextlib.contextmanager
def observe(
    model: nn.Module, names: Sequence[str], functions: Sequence[Callable[..., Any]], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Pass each result of the torch `functions` inside the named modules to `see(module name, result)`, while the model
    runs inside the `with` block. If named modules are nested, the innermost one is reported.

    Raises:
        CaptureError: a named module called none of the functions.
    """
    unseen = set(names)

    def handle(name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        unseen.discard(name)
        result = func(*args, **kwargs)
        see(name, result)
        return result

    with _intercept_calls(model, names, functions, handle):
        yield
    if unseen:
        wanted = " or ".join(dict.fromkeys(f.__name__ for f in functions))
        raise CaptureError(f"no call of {wanted} was intercepted in {_abbreviate(sorted(unseen))}")


def attention_layers(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, tuple[int, int]]:
    """Run the model once; return the modules that attend, name -> (heads, head size), in call order."""
    found: dict[str, tuple[int, int]] = {}

    def visit(name: str, q: Tensor, k: Tensor, v: Tensor, call: _AttentionCall) -> Tensor:
        found[name] = (k.shape[1], k.shape[3])
        return call(q, k, v)

    names = [name for name, _ in model.named_modules() if name]
    with _intercept(model, names, visit), torch.no_grad():
        model(*args, **kwargs)
    return found


class _AttentionCall:
    """One intercepted attention call without its q, k and v. Calling it computes the attention."""

    def __init__(self, func: Any, mask: Tensor | None, rest: dict[str, Any]) -> None:
        self.func, self.mask, self.rest = func, mask, rest

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
        result: Tensor = self.func(q, k, v, attn_mask=self.mask if mask is None else mask, **self.rest)
        return result


class _CallInterceptor(TorchFunctionMode):
    """Passes calls of `functions` inside named modules to `handle`, if they are made in the thread that created it.

    The mode is active only while a named module runs, because every torch call inside a mode costs microseconds. Modes
    belong to a thread, but hooks belong to a module: those of other threads do nothing.
    """

    def __init__(self, functions: Sequence[Any], handle: Any) -> None:
        super().__init__()
        self.thread = threading.get_ident()
        self.functions = tuple(functions)
        self.stack: list[str] = []
        """Names of the running modules, the innermost last."""
        # Disabled for torch.compile, which breaks its graphs here. If it traced them, it would specialize one graph on
        # each layer's name, and torch gives up compiling after a few recompilations.
        self.enter, self.leave, self.handle = (
            torch.compiler.disable(f)  # type: ignore[no-untyped-call]
            for f in (self._enter, self._leave, handle)
        )

    def forget(self) -> None:
        """Break the reference cycles through these functions, so that K and V are freed at once."""
        del self.enter, self.leave, self.handle

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self.functions:
            return func(*args, **(kwargs or {}))
        return self.handle(self.stack[-1], func, args, kwargs or {})

    def _enter(self, name: str, _module: nn.Module, _arguments: Any) -> None:
        if threading.get_ident() != self.thread:
            return
        if not self.stack:
            self.__enter__()  # type: ignore[no-untyped-call]
        self.stack.append(name)

    def _leave(self, _module: nn.Module, _arguments: Any, _output: Any) -> None:
        if threading.get_ident() != self.thread:
            return
        self.stack.pop()
        if not self.stack:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _intercept(model: nn.Module, names: Sequence[str], visit: Any) -> Iterator[None]:
    """Pass each attention call inside a named module to `visit`."""

    def handle(name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        # callers mix positional and keyword arguments; from here on all have names
        named = dict(zip(_POSITIONAL[: len(args)], args, strict=True)) | kwargs
        q, k, v = named.pop("query"), named.pop("key"), named.pop("value")
        return visit(name, q, k, v, _AttentionCall(func, named.pop("attn_mask", None), named))

    with _intercept_calls(model, names, (F.scaled_dot_product_attention,), handle):
        yield


@contextlib.contextmanager
def _intercept_calls(model: nn.Module, names: Sequence[str], functions: Sequence[Any], handle: Any) -> Iterator[None]:
    """Pass each call of the functions inside a named module to `handle`. If modules are nested, the call belongs to
    the innermost."""
    modules = {name: _module(model, name) for name in names}
    missing = [name for name, module in modules.items() if module is None]
    if missing:
        raise CaptureError(f"the model has no module {_abbreviate(missing)}", "correct the names in `attention_layers`")
    with exclusive(model):
        mode, handles = _CallInterceptor(functions, handle), []
        for name, module in modules.items():
            assert module is not None
            handles.append(module.register_forward_pre_hook(functools.partial(mode.enter, name)))
            # always_call: also when `_Finished` leaves the forward pass early, or the name would stay on the stack
            handles.append(module.register_forward_hook(mode.leave, always_call=True))
        try:
            yield
        finally:
            for hook in handles:
                hook.remove()
            mode.forget()


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _with_prefix_mask(mask: Tensor | None, valid: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Return the call's mask with columns for the prefix in front, (B, 1, Q, P + K); None if no token is masked.

    k: keys of the prefix and the call's own, (B, H, P + K, D).
    """
    if mask is None and valid is None:
        return None
    batch, _, queries, _ = q.shape
    # the prefix length follows from either: `valid` is as wide as the prefix, the mask as the call's own keys
    if valid is not None:
        prefix = valid.shape[1]
    else:
        assert mask is not None
        prefix = k.shape[2] - mask.shape[-1]
        valid = torch.ones(batch, prefix, dtype=torch.bool, device=q.device)
    own = k.shape[2] - prefix
    if mask is None:
        mask = torch.ones(batch, 1, queries, own, dtype=torch.bool, device=q.device)
    front = valid[:, None, None, :].expand(batch, mask.shape[1], queries, prefix)
    if mask.dtype != torch.bool:  # a float mask is added to the scores: 0 is visible, -inf is masked
        front = torch.zeros_like(front, dtype=mask.dtype).masked_fill(~front, float("-inf"))
    return torch.cat([front, mask.expand(batch, mask.shape[1], queries, own)], dim=-1)


def _abbreviate(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
