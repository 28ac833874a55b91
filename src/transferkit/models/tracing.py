"""Which layers of a network follow on which: what may be made one of them."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


_PATCHED = frozenset({"forward", "_conv_forward"})
"""Methods that computation goes through; a module may have its own, whatever its class is."""

_tracing = threading.Lock()


class _LayerTracer(fx.Tracer):
    """Trace how layers are called one after the other, without looking into them.

    Meanwhile `torch.fx` has all modules of the process call the tracer, in whatever thread. Those
    of other threads run as ever.
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        is_layer = isinstance(m, (*CONVOLUTIONS, _BatchNorm))
        return is_layer or super().is_leaf_module(m, module_qualified_name)


class TracedPart:
    """The calls of the layers of a network, or of a part of it.

    Args:
        network: The network or part.
        nodes: What `torch.fx` saw of its forward pass.
        shared: The modules that others may call, by their `id`.
    """

    def __init__(self, network: nn.Module, nodes: list[fx.Node], shared: set[int]) -> None:
        self.nodes: list[fx.Node] = nodes
        self._modules = dict(network.named_modules())
        self._shared = shared
        self._calls = Counter(node.target for node in nodes if node.op == "call_module")
        reads = (str(node.target) for node in nodes if node.op == "get_attr")
        self._read = {name.rpartition(".")[0] for name in reads}

    def layer(self, node: fx.Node) -> nn.Module | None:
        """Return the layer that a node calls, if nothing else calls it or reads its weights."""
        if node.op != "call_module" or self._calls[node.target] > 1 or node.target in self._read:
            return None
        module = self._modules[str(node.target)]
        has_hooks = module._forward_hooks or module._forward_pre_hooks
        is_patched = not _PATCHED.isdisjoint(vars(module))
        return None if has_hooks or is_patched or id(module) in self._shared else module

    def follower(self, node: fx.Node) -> fx.Node | None:
        """Return the call of a layer that alone sees what another one gives, and sees no more."""
        if len(node.users) != 1:
            return None
        user = next(iter(node.users))
        is_plain = user.op == "call_module" and user.args == (node,) and not user.kwargs
        return user if is_plain else None


def trace_parts(network: nn.Module) -> Iterator[TracedPart]:
    """Yield the network as a traced part, or, where it cannot be traced, those within it.

    Args:
        network: The network; its forward pass runs on stand-ins for tensors, in a copy.
    """
    try:
        # Of a copy: what a forward pass keeps in its modules would be stand-ins afterwards.
        copied = copy_modules(network)
        with _tracing:  # Two at a time would not put back what they have changed.
            nodes = list(_LayerTracer().trace(copied).nodes)
    except Exception:  # Whatever Python a forward pass runs on a stand-in for a tensor.
        # What stands in several of its parts may be called by each of them.
        shared = _find_shared(network)
        for child in network.children():
            for part in trace_parts(child):
                part._shared |= shared
                yield part
        return
    yield TracedPart(network, nodes, set())


def _find_shared(network: nn.Module) -> set[int]:
    """Return the modules that have several places in a network, by their `id`."""
    places = Counter(id(module) for _, module in network.named_modules(remove_duplicate=False))
    return {module for module, count in places.items() if count > 1}


def copy_modules(network: nn.Module) -> nn.Module:
    """Copy the modules of a network and their buffers, but not its parameters.

    Example:
        >>> network = nn.Linear(2, 1)
        >>> copied = copy_modules(network)
        >>> copied is network, copied.weight is network.weight
        (False, True)
    """
    return copy.deepcopy(network, {id(each): each for each in network.parameters()})


def replace_module(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, under each of its names."""
    for parent in network.modules():
        for name, child in parent._modules.items():  # `named_children` names each once.
            if child is old:
                parent._modules[name] = new


def is_timm_class(module: nn.Module, name: str) -> bool:
    """Return whether a module is of timm's class of a name, and of none derived from it."""
    kind = type(module)
    return kind.__name__ == name and kind.__module__.partition(".")[0] == "timm"
