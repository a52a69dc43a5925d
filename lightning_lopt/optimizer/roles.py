"""The roles of tensors in a net (`rules.matrix.ROLES`), told from the modules that hold them, or from their names.

A hidden layer, an embedding and a last layer may have the same shape, so shapes are never asked. Of all tensors that
are the weight of a layer, the last one is the output. An embedding that is tied to the last layer stays an embedding,
and there is no output then.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_LAYERS = (nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)

# Parts of a parameter's name, in the order in which they are looked for
_OTHER = re.compile(r"(^|\.)(wpe|tokens?|\w*(pos|position|positions|positional|cls)(_\w+)?)($|\.)")
_EMBEDDING = re.compile(r"(^|\.)(wte|\w*emb(ed(ding)?s?)?(_\w+)?)($|\.)")
_OUTPUT = re.compile(r"(^|\.)(\w*head|classifier|output|logits|score)($|\.)")
_EXPERTS = re.compile(r"expert", re.IGNORECASE)
_WEIGHT = re.compile(r"(^|_)weight(_|$)|^original\d+$")  # `original0` and so on: of torch's parametrizations


def by_module(module: nn.Module, params: Iterable[Tensor]) -> dict[Tensor, str]:
    """Parameter -> role, of those with two dims or more, from the types of a model's modules.

    Args:
        module: the model.
        params: the parameters that one optimizer holds; the last layer among them is the output.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9))
        >>> list(by_module(model, model.parameters()).values())
        ['embedding', 'hidden', 'output']
    """
    held = {id(param) for param in params}
    roles: dict[Tensor, str] = {}
    last = None
    for path, owner in module.named_modules():
        for name, param in owner.named_parameters(recurse=False):
            if id(param) in held and (is_lazy(param) or param.dim() > 1):
                role = _role_in(owner, path, name, param)
                last = param if role in ("hidden", "experts") else last
                roles[param] = "embedding" if roles.get(param) == "embedding" else role
    return _with_output(roles, last)


def by_name(named: Iterable[tuple[str, Tensor]]) -> dict[Tensor, str]:
    """The same from names alone, as `model.named_parameters()` gives them.

    A name with a part such as `embed_tokens` or `wte` is an embedding's, with `lm_head` or `classifier` an output's,
    with `pos_embed` or `cls_token` another one's, and with `weight` a hidden layer's.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 9))
        >>> list(by_name(model.named_parameters()).values())
        ['hidden', 'output']
    """
    roles = {param: _role_of_name(name, param) for name, param in named if is_lazy(param) or param.dim() > 1}
    if "output" in roles.values() or "embedding" in roles.values():
        return roles  # an embedding without an output is tied to it, as far as names tell
    layers = [param for param, role in roles.items() if role == "hidden"]
    return _with_output(roles, layers[-1] if layers else None)


def _role_in(owner: nn.Module, path: str, name: str, param: Tensor) -> str:
    if isinstance(owner, _EMBEDDINGS):
        return "embedding"
    if isinstance(owner, _CONVOLUTIONS):  # the filters of groups see different inputs
        return "hidden" if owner.groups == 1 else "other"
    if isinstance(owner, _LAYERS):
        return "hidden" if _WEIGHT.search(name) else "other"
    if not is_lazy(param) and param.dim() == 3 and _EXPERTS.search(f"{path}.{type(owner).__name__}.{name}"):
        return "experts"
    # Modules of the user's: position embeddings and tokens are bare parameters, layers call theirs a weight.
    return "hidden" if _WEIGHT.search(name) and not _OTHER.search(f"{path}.{name}") else "other"


def _role_of_name(name: str, param: Tensor) -> str:
    if _OTHER.search(name):
        return "other"
    if _EMBEDDING.search(name):
        return "embedding"
    if _OUTPUT.search(name):
        return "output"
    if not is_lazy(param) and param.dim() == 3 and _EXPERTS.search(name):
        return "experts"
    return "hidden" if _WEIGHT.search(name.rpartition(".")[2]) else "other"


def _with_output(roles: dict[Tensor, str], last: Tensor | None) -> dict[Tensor, str]:
    """Roles in which the last layer is the output, unless it is an embedding, too."""
    if last is not None and roles[last] == "hidden":
        return {**roles, last: "output"}
    return roles
