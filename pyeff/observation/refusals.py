"""What `observe` cannot do, known before anything runs."""

from __future__ import annotations

from torch import nn

from pyeff.observation.noise_scale import NoiseScale


def check_wanted(norms: bool, by_parameter: bool, noise_scale: NoiseScale | None, alone: bool) -> None:
    """Raises `ValueError` where the norms are asked for and are not, or are all (`alone`) that could be."""
    if norms:
        return
    if alone:
        raise ValueError("norms=False leaves nothing to observe")
    if by_parameter or noise_scale is not None:
        raise ValueError(f"{'by_parameter' if by_parameter else 'noise_scale'} needs the norms: leave norms=True")


def check_deferred(model: nn.Module, strict: bool, noise_scale: NoiseScale | None, gradient: bool) -> None:
    """Raises `ValueError` where gradients cannot be formed later."""
    if not gradient:
        raise ValueError("defer=True forms the gradient later and gradient=False never: pass one of them")
    if not strict:
        raise ValueError("defer=True needs strict=True: what is not observed has no gradient to be formed later")
    if noise_scale is not None:
        raise ValueError("noise_scale needs the gradient of all samples: leave defer=False")
    if getattr(model, "_comm_hooks", None):
        raise ValueError("the model has a communication hook, which a deferred gradient would not pass through")


def refuse_compiled(model: nn.Module) -> None:
    """Raises `ValueError` for a model of which a part is compiled."""
    for name, module in model.named_modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if getattr(module, "_compiled_call_impl", None) is not None or kinds & {"OptimizedModule", "ScriptModule"}:
            raise ValueError(
                f"module {name or '(the model itself)'!r} is compiled, and compiled code cannot be observed: observe "
                "the model before torch.compile, or train it uncompiled"
            )


def known_unobservable(model: nn.Module, parameters: dict[int, tuple[str, nn.Parameter]]) -> dict[str, str]:
    """Name -> reason, of parameters whose kind or module is known not to be observed."""
    found = {}
    for name, parameter in parameters.values():
        if type(parameter) is not nn.Parameter:
            found[name] = f"it is a {type(parameter).__name__}, not a plain parameter"
        elif parameter.is_sparse or not parameter.is_floating_point():
            found[name] = f"its layout or type, {parameter.layout} of {parameter.dtype}, has no dense real gradient"
    for module in model.modules():
        reason = None
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            reason = "batch normalisation mixes the samples"
        elif isinstance(module, nn.RNNBase):
            reason = f"{type(module).__name__} does not show its steps"
        elif isinstance(module, nn.MultiheadAttention | nn.Bilinear):
            reason = f"{type(module).__name__} is not observed"
        elif isinstance(module, nn.Embedding) and (
            module.max_norm is not None or module.scale_grad_by_freq or module.sparse
        ):
            reason = "an embedding with max_norm, scale_grad_by_freq or sparse gradients is not observed"
        elif isinstance(module, nn.EmbeddingBag):
            reason = "EmbeddingBag is not observed"
        if reason is not None:
            for parameter in module.parameters():
                if id(parameter) in parameters:
                    found[parameters[id(parameter)][0]] = reason
    return found
