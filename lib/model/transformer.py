"""The transformer: one forward for training, prefill and decoding, and a loss that never holds all logits."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lib.config import SMEAR_CHANNELS, VALUE_GATE_CHANNELS, Config
from lib.model.attention import ATTENTION, BLOCKS, RESIDUAL_NAME
from lib.parallel.layout import enter, gather, leave, own_part
from lib.params import init_params, param_specs  # noqa: F401  (part of this module's public surface)

# what remat="dots" keeps beside each layer's input: backward recomputes norms, rotations, activations and the attention's
# output projection (3 % of a step for a tenth of the memory), but no wide matrix product and no attention kernel
SAVED = ("q", "k", "v", RESIDUAL_NAME, "mlp_in", "mlp_gate")
RING = 16  # cache slots come in multiples of this: whole vector registers


def rms_norm(x):
    """x / rms(x) over the last axis, without weights; eps is float32's machine epsilon, as in PyTorch's rms_norm."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + jnp.finfo(jnp.float32).eps)
    return (x32 * scale).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def project(spec: str, x, w):
    """einsum of activations with a weight, its weight gradient written so that the smaller of its operands is transposed.

    XLA:CPU transposes a copy of the first operand. Autodiff's order makes that the mlp's wide activations.
    """
    return jnp.einsum(spec, x, w)


def _project_forward(spec, x, w):
    return jnp.einsum(spec, x, w), (x, w)


def _project_backward(spec, saved, g):
    x, w = saved
    xs, ws, ys = spec.replace("->", ",").split(",")
    if x.size <= g.size:
        w_grad = jnp.einsum(f"{xs},{ys}->{ws}", x, g)
    else:
        turned = "".join(c for c in ys + xs if c in ws)  # what a product in this order gives
        # without the barrier XLA turns the operands round again
        w_grad = jnp.einsum(
            f"{turned}->{ws}",
            jax.lax.optimization_barrier(jnp.einsum(f"{ys},{xs}->{turned}", g, x)),
        )
    return jnp.einsum(f"{ys},{ws}->{xs}", g, w), w_grad


project.defvjp(_project_forward, _project_backward)


def weigh(spec: str, x, w):
    """`project`, for a weight that may be int8 (see `quantized`): {"int8": (outputs..., inputs), "scale": (outputs,)}."""
    if not isinstance(w, dict):
        return project(spec, x, w)
    *outputs, inputs = w["int8"].shape
    # the barrier keeps XLA from converting all weights once, before the decoding loop, and then reading them wide
    x_MI, w_OI = jax.lax.optimization_barrier(
        (x.reshape(-1, inputs), w["int8"].reshape(-1, inputs))
    )
    w_OI = w_OI.astype(x.dtype)
    # one row as a sum: XLA:CPU converts on the fly there; before a product it writes the converted weight out
    y_MO = (x_MI * w_OI).sum(-1, dtype=jnp.float32)[None] if len(x_MI) == 1 else x_MI @ w_OI.T
    leading = x.shape[: len(spec.split("->")[1]) - len(outputs)]
    return (y_MO * w["scale"]).astype(x.dtype).reshape(*leading, *outputs)


@jax.custom_vjp
def fence(tree):
    """Identity whose gradients must all be there before any is used.

    Around a layer it makes backward finish the layer's weight gradients before it goes on to the layer below. Left alone, XLA's
    TPU scheduler puts them off and keeps the wide activations of several layers alive for them.
    """
    return tree


fence.defvjp(lambda tree: (tree, None), lambda _, g: (jax.lax.optimization_barrier(g),))


def rope_tables(positions, config: Config):
    """cos, and sin with the sign of its half, of shape (*positions.shape, 1, H), in the compute dtype as nanochat has them."""
    half = config.head_dim // 2
    frequency = config.rope_base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle).astype(config.dtype), jnp.sin(angle).astype(config.dtype)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([sin, -sin], axis=-1)


def rotate(x_BTNH, cos, sin):
    """Rotary embedding over split halves, by minus the angle (nanochat's sign; Su et al. 2021)."""
    a, b = jnp.split(x_BTNH, 2, axis=-1)
    # XLA:CPU takes three passes for the halves one by one
    return x_BTNH * cos + jnp.concatenate([b, a], axis=-1) * sin


def write_cache(ring_XSH, new_BTKH, at_BT, length_B):
    """Put new keys or values at positions at_BT, from length_B on (negative: nowhere), into a ring, where position p lies in slot p mod S."""
    B, T, K, H = new_BTKH.shape
    S = ring_XSH.shape[1]
    new_BTKH = new_BTKH.astype(ring_XSH.dtype)
    if B == T == 1:  # padding spoils only the slot whose turn it is, and nobody needs that any more
        return jax.lax.dynamic_update_slice(
            ring_XSH, new_BTKH[0].swapaxes(0, 1), (0, length_B[0] % S, 0)
        )
    last_B1 = jnp.max(at_BT, axis=1, keepdims=True)
    # of more than S new ones the last S stay
    slot_BT = jnp.where((at_BT >= 0) & (at_BT > last_B1 - S), at_BT % S, S)
    ring_BKSH = (
        ring_XSH.reshape(B, K, S, H)
        .at[jnp.arange(B)[:, None], :, slot_BT]
        .set(new_BTKH, mode="drop")
    )
    return ring_BKSH.reshape(ring_XSH.shape)


def held_positions(length_B, S: int):
    """(B, S): which position each slot of a ring holds once a row has `length` tokens; negative where it is empty."""
    last_B1 = length_B[:, None] - 1
    return last_B1 - (last_B1 - jnp.arange(S)) % S


def cached_attention(q_BTNH, keys, values, at_BT, held_BS, window: int):
    """Attention of queries at positions at_BT (negative: padding) over positions held_BS (negative: none), `window` back at most.

    keys and values are lists of (B K, S, H), one behind the other in held_BS; they are not joined, to save copying a cache.
    """
    B, T, N, H = q_BTNH.shape
    K = keys[0].shape[0] // B
    # M: query heads of a group, then T
    q_XMH = q_BTNH.reshape(B, T, K, -1, H).transpose(0, 2, 3, 1, 4).reshape(B * K, -1, H)
    s = [
        jnp.einsum("XMH,XSH->XMS", q_XMH, k_XSH, preferred_element_type=jnp.float32)
        for k_XSH in keys
    ]
    s_BKGTS = jnp.concatenate(s, axis=-1).reshape(B, K, N // K, T, -1) / math.sqrt(H)
    distance = at_BT[:, :, None] - held_BS[:, None]
    visible = (distance >= 0) & (distance <= window) & (held_BS >= 0)[:, None]
    # a finite floor, not -inf: a padding query sees nothing and must not make NaN
    p_XMS = jax.nn.softmax(jnp.where(visible[:, None, None], s_BKGTS, -1e30), axis=-1).reshape(
        B * K, N // K * T, -1
    )
    parts = jnp.split(p_XMS.astype(values[0].dtype), [values[0].shape[1]], axis=-1)
    o_XMH = sum(jnp.einsum("XMS,XSH->XMH", p, v_XSH) for p, v_XSH in zip(parts, values))
    return o_XMH.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _attention(h_BTD, w, config: Config, rope, window: int, ve_BTKH, kv):
    """One layer's attention; `kv` is None, or (k cache, v cache, positions, lengths) and the new (k, v) is returned too."""
    with jax.named_scope("qkv"):
        q_BTNH = checkpoint_name(weigh("BTD,DNH->BTNH", h_BTD, w["wq"]), "q")
        k_BTKH = checkpoint_name(weigh("BTD,DKH->BTKH", h_BTD, w["wk"]), "k")
        v_BTKH = checkpoint_name(weigh("BTD,DKH->BTKH", h_BTD, w["wv"]), "v")
    if ve_BTKH is not None:
        with jax.named_scope("value_embed"):
            gate_BTK = 3 * jax.nn.sigmoid(
                jnp.einsum("BTC,CK->BTK", h_BTD[..., :VALUE_GATE_CHANNELS], w["value_gate"])
            )
            v_BTKH = v_BTKH + gate_BTK[..., None] * ve_BTKH
    with jax.named_scope("rope"):
        q_BTNH, k_BTKH = rotate(q_BTNH, *rope), rotate(k_BTKH, *rope)
        if config.qk_norm:
            q_BTNH, k_BTKH = rms_norm(q_BTNH), rms_norm(k_BTKH)
        q_BTNH, k_BTKH = q_BTNH * config.qk_scale, k_BTKH * config.qk_scale
    with jax.named_scope("attention"):
        if kv is None:
            visible = window if window < config.sequence_len else None
            options = (
                {"block": config.attention_block}
                if config.attention_block and config.attention_name in BLOCKS
                else {}
            )
            o_BTNH = ATTENTION[config.attention_name](q_BTNH, k_BTKH, v_BTKH, visible, **options)
        else:
            *old, at_BT, length_B = kv
            kv = [
                write_cache(ring, new, at_BT, length_B) for ring, new in zip(old, (k_BTKH, v_BTKH))
            ]
            S = old[0].shape[1]
            # decoding: what the one new token overwrote is outside its window
            if at_BT.shape[1] == 1:
                o_BTNH = cached_attention(
                    q_BTNH, kv[:1], kv[1:], at_BT, held_positions(length_B + 1, S), window
                )
            # the last of many may overwrite what the first must see: look at the ring as it was,
            # and at the new ones
            else:
                held_BS = jnp.concatenate([held_positions(length_B, S), at_BT], axis=1)
                flat = lambda a: (
                    a.astype(old[0].dtype).swapaxes(1, 2).reshape(-1, a.shape[1], a.shape[3])
                )
                keys, values = [old[0], flat(k_BTKH)], [old[1], flat(v_BTKH)]
                o_BTNH = cached_attention(q_BTNH, keys, values, at_BT, held_BS, window)
    with jax.named_scope("attention_out"):
        if kv is not None:  # as one matrix: XLA:CPU would transpose the weight for every token
            wo = w["wo"] if isinstance(w["wo"], dict) else w["wo"].reshape(-1, w["wo"].shape[-1])
            return weigh("BTX,XD->BTD", o_BTNH.reshape(*o_BTNH.shape[:2], -1), wo), kv
        return weigh("BTNH,NHD->BTD", o_BTNH, w["wo"]), kv


def _mlp(h_BTD, w, config: Config):
    a_BTF = checkpoint_name(weigh("BTD,DF->BTF", h_BTD, w["w_in"]), "mlp_in")
    if config.mlp == "relu2":
        a_BTF = jnp.square(jax.nn.relu(a_BTF))
    elif config.mlp == "gelu":
        a_BTF = jax.nn.gelu(a_BTF)
    else:
        a_BTF = (
            jax.nn.silu(checkpoint_name(weigh("BTD,DF->BTF", h_BTD, w["w_gate"]), "mlp_gate"))
            * a_BTF
        )
    return weigh("BTF,FD->BTD", a_BTF, w["w_out"])


def _block(x_BTD, x0_BTD, w, ve_BTKH, config: Config, rope, window: int, kv=None):
    """One layer: residual and x0 scales, attention, mlp. Weights and value embeddings of this layer only; returns (x, new kv)."""
    x_BTD, w = fence((x_BTD, w))
    w = {name: gather(f"blocks.{name}", a, stacked=True) for name, a in w.items()}
    dtype = x_BTD.dtype
    if config.resid_scales:
        x_BTD = w["resid_scale"].astype(dtype) * x_BTD
    if config.x0_scales:
        x_BTD = x_BTD + w["x0_scale"].astype(dtype) * x0_BTD
    with jax.named_scope("attn"):
        out_BTD, kv = _attention(enter(rms_norm(x_BTD)), w, config, rope, window, ve_BTKH, kv)
        x_BTD = x_BTD + leave(out_BTD)
    with jax.named_scope("mlp"):
        x_BTD = x_BTD + leave(_mlp(enter(rms_norm(x_BTD)), w, config))
    return x_BTD, kv


def unstack(params, config: Config):
    """The same parameters with blocks as a list of one dict per layer and value_embeds as {layer: table}.

    Split, not indexed: its gradient is one concatenation rather than a padded sum per layer.
    """
    split = lambda a: [p[0] for p in jnp.split(a, a.shape[0])]
    parts = {name: split(a) for name, a in params["blocks"].items()}
    gates = dict(zip(config.value_layers, parts.pop("value_gate", [])))
    blocks = [{name: p[i] for name, p in parts.items()} for i in range(config.n_layer)]
    for i, gate in gates.items():
        blocks[i]["value_gate"] = gate
    tables = (
        dict(zip(config.value_layers, split(params["value_embeds"]))) if config.value_embeds else {}
    )
    return params | {"blocks": blocks, "value_embeds": tables}


def group_size(config: Config) -> tuple[int, int]:
    """(layers per scanned group, groups): the longest run of equal groups from layer 0; what is left is unrolled."""
    period = math.lcm(len(config.window_pattern), 2 if config.value_embeds else 1)
    groups = config.n_layer // period
    if groups and config.windows[: groups * period] != config.windows[:period] * groups:
        groups -= 1  # the last layer is always long, whatever the pattern says
    return period, groups if config.scan_layers and groups > 1 else 0


def value_rows(params, tokens_BT, config: Config):
    """The value embeddings of these tokens, (Lv, B, T, K, H) or {layer: (B, T, K, H)} as the tables are.

    Looked up before the layers, not within them: a scan over layers would copy a whole table for each.
    """
    tables = params.get("value_embeds")
    if not config.value_embeds or isinstance(tables, dict):
        return {
            i: gather("value_embeds", t, stacked=True)[tokens_BT].astype(config.dtype)
            for i, t in (tables or {}).items()
        }
    return gather("value_embeds", tables)[:, tokens_BT].astype(config.dtype)


def _layers(x_BTD, x0_BTD, params, tokens_BT, config: Config, rope):
    """All layers without a cache; returns the last output and that of the middle layer (for backout)."""
    with jax.named_scope("value_embed"):
        ve = value_rows(params, tokens_BT, config)
    middle = config.n_layer // 2

    def layer(carry, w, ve_BTKH, window):
        block = partial(_block, config=config, rope=rope, window=window)
        if config.remat == "layer":
            block = jax.checkpoint(block)
        elif config.remat == "dots":
            block = jax.checkpoint(
                block, policy=jax.checkpoint_policies.save_only_these_names(*SAVED)
            )
        return block(carry, x0_BTD, w, ve_BTKH)[0]

    period, groups = group_size(config)
    blocks = params["blocks"]
    groups = 0 if isinstance(blocks, list) else groups
    kept = jnp.zeros_like(x_BTD) if config.backout else None
    first = groups * period
    if groups:
        per_group = len([i for i in config.value_layers if i < period])
        fold = lambda a, n: a[: groups * n].reshape(groups, n, *a.shape[1:])
        count = lambda name: per_group if name == "value_gate" else period
        xs = (
            {name: fold(a, count(name)) for name, a in blocks.items()},
            fold(ve, per_group) if config.value_embeds else None,
            jnp.arange(groups),
        )

        def group(carry, xs):
            x, kept = carry
            w, rows, g = xs
            for j in range(period):
                nth = sum(i < j for i in config.value_layers)
                has = j in config.value_layers
                wj = {
                    name: a[nth if name == "value_gate" else j]
                    for name, a in w.items()
                    if name != "value_gate" or has
                }
                x = layer(x, wj, rows[nth] if has else None, config.windows[j])
                if config.backout and j == middle % period:
                    kept = jnp.where(g == middle // period, x, kept)
            return (x, kept), None

        (x_BTD, kept), _ = jax.lax.scan(group, (x_BTD, kept), xs)
    if first < config.n_layer:
        if not isinstance(blocks, list):
            params = unstack({**params, "value_embeds": ve}, config)  # splits the rows by layers
            ve = params["value_embeds"]
        for i in range(first, config.n_layer):
            with jax.named_scope(f"layer{i}"):
                x_BTD = layer(x_BTD, params["blocks"][i], ve.get(i), config.windows[i])
            if i == middle:
                kept = x_BTD
    return x_BTD, kept


def hidden(params, config: Config, tokens_BT, cache=None):
    """The final normed residual stream (B, T, D) that the head reads, and the cache with these tokens added."""
    real_BT = None if cache is None else tokens_BT >= 0
    tokens_BT = tokens_BT if cache is None else jnp.maximum(tokens_BT, 0)
    with jax.named_scope("embed"):
        table_VD = gather("embed", params["embed"])
        embed = lambda ids: rms_norm(table_VD[ids].astype(config.dtype))
        x_BTD = embed(tokens_BT)
        if config.smear:
            if cache is None:
                before_BTD = jnp.pad(x_BTD[:, :-1], ((0, 0), (1, 0), (0, 0)))
            else:  # before the first position there is nothing: its last token is -1
                last = cache["last"][:, None]
                before_BTD = jnp.concatenate(
                    [jnp.where(last[..., None] >= 0, embed(last), 0), x_BTD[:, :-1]], axis=1
                )
            gate_BT = jax.nn.sigmoid(
                x_BTD[..., :SMEAR_CHANNELS] @ params["smear"]["gate"].astype(config.dtype)
            )
            x_BTD = (
                x_BTD
                + (params["smear"]["scale"].astype(config.dtype) * gate_BT)[..., None] * before_BTD
            )
    x0_BTD = x_BTD
    B, T = tokens_BT.shape
    # once for all layers, so that their stacked gradients are held in the compute dtype too
    matrices = lambda a: a.astype(config.dtype) if a.ndim > 1 and a.dtype != jnp.int8 else a
    params = params | {"blocks": jax.tree.map(matrices, params["blocks"])}
    if cache is None:
        rope = rope_tables(jnp.arange(T), config)
        x_BTD, kept = _layers(x_BTD, x0_BTD, params, tokens_BT, config, rope)
    else:
        if not isinstance(params["blocks"], list):
            params = unstack(params, config)
        length_B, last_B = cache["length"], cache["last"]
        positions_BT = length_B[:, None] + jnp.arange(T)
        rope = rope_tables(positions_BT, config)
        at_BT = jnp.where(real_BT, positions_BT, -1)
        keys, values, kept, ve = [], [], None, value_rows(params, tokens_BT, config)
        for i, (w, k, v) in enumerate(zip(params["blocks"], cache["k"], cache["v"])):
            x_BTD, (k, v) = _block(
                x_BTD,
                x0_BTD,
                w,
                ve.get(i),
                config,
                rope,
                config.windows[i],
                (k, v, at_BT, length_B),
            )
            keys.append(k), values.append(v)
            kept = x_BTD if i == config.n_layer // 2 else kept
        new_B = real_BT.sum(axis=1, dtype=length_B.dtype)
        newest_B = jnp.take_along_axis(tokens_BT, jnp.maximum(new_B - 1, 0)[:, None], axis=1)[:, 0]
        cache = {
            "k": keys,
            "v": values,
            "length": length_B + new_B,
            "last": jnp.where(new_B > 0, newest_B, last_B),
        }
    if config.backout:
        x_BTD = x_BTD - params["backout"].astype(x_BTD.dtype) * kept
    return rms_norm(x_BTD), cache


def init_cache(config: Config, batch: int, length: int, spare: int = 0):
    """An empty cache for `batch` rows of up to `length` tokens: per layer k and v (B K, S, H), lengths, last tokens.

    A layer's S is its window and a little more, used as a ring; `length` where that is less. A row may be cut back by up to `spare`
    tokens (always, while it holds no more than S) by setting its `length` and `last`, the token before the next one.
    """
    slots = [min(length, -(-(window + 1 + spare) // RING) * RING) for window in config.windows]
    zeros = lambda: [
        jnp.zeros((batch * config.n_kv_head, S, config.head_dim), config.dtype) for S in slots
    ]
    return {
        "k": zeros(),
        "v": zeros(),
        "length": jnp.zeros(batch, jnp.int32),
        "last": jnp.full(batch, -1, jnp.int32),
    }


def decoding_params(params, config: Config):
    """The parameters as decoding reads them, to be made once: a dict per layer, matrices in the compute dtype (int8 stays).

    What is so already comes back as it is, not as a copy.
    """
    wide = lambda a: a.ndim > 1 and a.dtype not in (jnp.int8, config.dtype)
    if isinstance(params["blocks"], list) and not any(map(wide, jax.tree.leaves(params))):
        return params
    return _decoding_params(params, config)


@partial(jax.jit, static_argnums=1)
def _decoding_params(params, config):
    cast = lambda a: a.astype(config.dtype) if a.ndim > 1 and a.dtype != jnp.int8 else a
    return jax.tree.map(
        cast, params if isinstance(params["blocks"], list) else unstack(params, config)
    )


@partial(jax.jit, static_argnums=1)
def quantized(params, config: Config):
    """The parameters with every matrix of a block, and the head, in int8 with a scale per output: for evaluation and decoding.

    Weights only: activations keep their dtype, and so do tables that are looked up. A quarter of float32's bytes; what that costs
    in quality and brings in speed is measured by `python -m benchmarks.decode`.
    """

    def quantize(w, n_in):
        outputs = w.shape[n_in:]
        w_OI = w.reshape(-1, math.prod(outputs)).T
        scale_O = jnp.maximum(jnp.abs(w_OI).max(axis=1), 1e-30) / 127
        return {
            "int8": jnp.round(w_OI / scale_O[:, None]).astype(jnp.int8).reshape(*outputs, -1),
            "scale": scale_O,
        }

    n_in = {"wq": 1, "wk": 1, "wv": 1, "wo": 2, "w_in": 1, "w_gate": 1, "w_out": 1}
    params = unstack(params, config)
    blocks = [
        {name: quantize(a, n_in[name]) if name in n_in else a for name, a in w.items()}
        for w in params["blocks"]
    ]
    return params | {"blocks": blocks, "head": quantize(_head(params, config), 1)}


def _head(params, config: Config):
    if config.tied_head and "head" not in params:  # int8 gives a tied model a head of its own
        return gather("embed", params["embed"]).T
    return gather("head", params["head"])


def _logits(x, head, config: Config):
    """Float32 logits over the true vocabulary, soft-capped."""
    if isinstance(head, dict):
        logits = (
            weigh("CD,DV->CV", x.reshape(-1, x.shape[-1]), head)
            .astype(jnp.float32)
            .reshape(*x.shape[:-1], -1)
        )
    else:
        logits = jnp.matmul(x, head.astype(x.dtype), preferred_element_type=jnp.float32)
    logits = logits[..., : config.vocab_size]
    return config.softcap * jnp.tanh(logits / config.softcap) if config.softcap else logits


def logits(params, config: Config, x_BTD):
    """What the head makes of `hidden`'s output: float32 (..., V)."""
    with jax.named_scope("head"):
        return _logits(x_BTD, _head(params, config), config)


def forward(params, config: Config, tokens_BT, cache=None):
    """Logits (B, T, V) in float32 after `tokens_BT`, and the updated cache (None without one).

    Without a cache this is the training forward over whole rows. With one (see `init_cache`) the tokens continue each
    row: many at once to prefill, one at a time to decode. Rows that get fewer are padded behind with -1, which adds nothing
    to the cache and whose logits mean nothing.
    """
    x_BTD, cache = hidden(params, config, tokens_BT, cache)
    return logits(params, config, x_BTD), cache


def _chunks(x_BTD, targets_BT, chunk: int):
    """Rows of tokens (M, C, D) and targets (M, C), padded with ignored ones to whole chunks."""
    x, t = x_BTD.reshape(-1, x_BTD.shape[-1]), targets_BT.reshape(-1)
    chunk = min(chunk, len(t))
    short = -len(t) % chunk
    if short:
        x, t = jnp.pad(x, ((0, short), (0, 0))), jnp.pad(t, (0, short), constant_values=-1)
    return x.reshape(-1, chunk, x.shape[-1]), t.reshape(-1, chunk)


def _chunk_loss(x, head, t, config: Config):
    """Per-token loss (C,) of one chunk, with what its gradient needs: logits and their log-sum-exp."""
    logits = _logits(x, head, config)
    lse = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, jnp.maximum(t, 0)[:, None], axis=-1)[:, 0]
    return jnp.where(t >= 0, lse - picked, 0.0), logits, lse


def token_losses(params, config: Config, tokens_BT, targets_BT):
    """Cross-entropy in nats per token (B, T) in float32, 0 where the target is negative; not meant for gradients."""
    x_BTD, _ = hidden(params, config, tokens_BT)
    x, t = _chunks(x_BTD, targets_BT, config.loss_chunk)
    head = _head(params, config)
    head = head if isinstance(head, dict) else head.astype(x.dtype)
    losses = jax.lax.map(lambda xt: _chunk_loss(xt[0], head, xt[1], config)[0], (x, t))
    return losses.reshape(-1)[: targets_BT.size].reshape(targets_BT.shape)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def summed_loss(x_BTD, head_DV, targets_BT, config: Config):
    """Sum of cross-entropies over targets >= 0, holding the logits of one chunk of tokens at a time."""
    x, t = _chunks(x_BTD, targets_BT, config.loss_chunk)
    head = head_DV.astype(x.dtype)
    return jax.lax.map(lambda xt: _chunk_loss(xt[0], head, xt[1], config)[0].sum(), (x, t)).sum()


def _summed_loss_forward(x_BTD, head_DV, targets_BT, config: Config):
    """The loss and, while a chunk's logits are at hand, its gradients: backward has only to scale them."""
    x, t = _chunks(x_BTD, targets_BT, config.loss_chunk)
    head = head_DV.astype(x.dtype)

    def chunk(head_grad, xt):
        x, t = xt
        loss, logits, lse = _chunk_loss(x, head, t, config)
        # compared, not scattered: stays in the fusion
        hit = jnp.arange(config.vocab_size) == t[:, None]
        d = jnp.exp(logits - lse[:, None]) - hit
        if config.softcap:
            d = d * (1 - jnp.square(logits / config.softcap))
        d = jnp.where(t[:, None] >= 0, d, 0).astype(x.dtype)
        d = jnp.pad(d, ((0, 0), (0, config.padded_vocab - config.vocab_size)))
        head_grad += jnp.einsum("CD,CV->DV", x, d, preferred_element_type=jnp.float32)
        return head_grad, (loss.sum(), jnp.einsum("CV,DV->CD", d, head))

    zero = jnp.zeros(head_DV.shape, jnp.float32)
    if len(t) == 1:
        head_grad, (losses, x_grad) = chunk(zero, (x[0], t[0]))
    else:
        head_grad, (losses, x_grad) = jax.lax.scan(chunk, zero, (x, t))
    x_grad = x_grad.reshape(-1, x.shape[-1])[: targets_BT.size].reshape(x_BTD.shape)
    return losses.sum(), (x_grad, head_grad)


def _summed_loss_backward(config, saved, g):
    x_grad, head_grad = saved
    return (g * x_grad).astype(x_grad.dtype), g * head_grad, None


summed_loss.defvjp(_summed_loss_forward, _summed_loss_backward)


def loss_sums(params, config: Config, tokens_BT, targets_BT):
    """(sum of losses, number of targets >= 0): what gradient accumulation adds up.

    Traced for one device's share of a mesh, it sums over the share's rows and over its part of each row (tensor axis).
    """
    x_BTD, _ = hidden(params, config, tokens_BT)
    with jax.named_scope("loss"):
        targets_BT = own_part(targets_BT, axis=1)
        total = summed_loss(
            own_part(enter(x_BTD), axis=1), enter(_head(params, config)), targets_BT, config
        )
    return total, jnp.sum(targets_BT >= 0)


def loss_fn(params, config: Config, tokens_BT, targets_BT):
    """Mean cross-entropy in nats over targets >= 0 (0 when there are none), and {"loss_sum", "count"}."""
    total, count = loss_sums(params, config, tokens_BT, targets_BT)
    return total / jnp.maximum(count, 1), {"loss_sum": total, "count": count}
