// What lib.preflight estimates, once more for the dashboard: the same functions by the same names.
//
// config.py's from_depth, params.py's counts, memory.py, roofline.py, estimate.py and plan.py, in
// that order. A change there is made here too: tests/preflight/test_dashboard.py compares the two
// over a grid of settings. `DATA` holds the tables and defaults that dashboard.py writes beside it.
"use strict";

// ---- arithmetic as Python does it ---------------------------------------------------------------

const floor_div = (a, b) => Math.floor(a / b);
const round_up = (size, multiple) => Math.ceil(size / multiple) * multiple;
const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);
const product = (numbers) => numbers.reduce((total, number) => total * number, 1);

// Halves go to the even neighbour.
function round(x) {
  const below = Math.floor(x);
  if (x - below !== 0.5) return Math.round(x);
  return below % 2 === 0 ? below : below + 1;
}

const nearest_multiple = (size, multiple) => Math.max(1, round(size / multiple)) * multiple;

// ---- config.py ----------------------------------------------------------------------------------

const SIZES = ["n_layer", "n_embd", "n_head", "n_kv_head", "mlp_dim", "total_batch_size", "microbatch", "num_steps"];

function shape_of(depth, aspect_ratio, overrides) {
  const head_dim = overrides.head_dim ?? DATA.defaults.head_dim;
  const n_embd = overrides.n_embd ?? Math.ceil((depth * aspect_ratio) / head_dim) * head_dim;
  const n_head = overrides.n_head ?? Math.max(1, floor_div(n_embd, head_dim));
  const mlp_dim = overrides.mlp === "swiglu" ? round_up((n_embd * 8) / 3, 128) : 4 * n_embd;
  const derived = { n_layer: depth, n_embd, n_head, n_kv_head: n_head, mlp_dim, sequence_len: DATA.defaults.sequence_len };
  return { ...derived, ...overrides };
}

// All sizes, batch and horizon from the number of layers; anything can be overridden by name.
function from_depth(depth, overrides = {}, aspect_ratio = 64) {
  const shape = { ...DATA.defaults, ...shape_of(depth, aspect_ratio, overrides) };
  const others = Object.fromEntries(Object.entries(overrides).filter(([name]) => !SIZES.includes(name)));
  const at_12 = { ...DATA.defaults, ...shape_of(12, aspect_ratio, others) };
  const config = { ...shape };

  if (!("total_batch_size" in overrides)) {
    const growth = target_tokens(shape) / target_tokens(at_12);
    const batch = 2 ** round(Math.log2(DATA.REFERENCE_BATCH * growth ** 0.383));
    const unit = shape.sequence_len * (overrides.microbatch ?? 1);
    config.total_batch_size = batch % unit ? nearest_multiple(batch, unit) : batch;
  }
  if (!("microbatch" in overrides)) {
    const rows = floor_div(config.total_batch_size, shape.sequence_len);
    config.microbatch = 1;
    for (let m = 1; m <= Math.min(rows, DATA.defaults.microbatch); m++) {
      if (rows % m === 0) config.microbatch = m;
    }
  }
  if (!("num_steps" in overrides)) {
    config.num_steps = Math.max(1, floor_div(target_tokens(shape), config.total_batch_size));
  }
  return config;
}

const padded_vocab = (c) => round_up(c.vocab_size, 64);
const accumulate = (c) => floor_div(c.total_batch_size, c.microbatch * c.sequence_len);
const itemsize = (c) => (c.compute_dtype === "float32" ? 4 : 2);
const target_tokens = (c) => Math.trunc(c.tokens_per_param * scaling_params(c));

// Per layer, how many keys before itself a query sees.
function windows(c) {
  const short = Math.ceil(Math.ceil(c.sequence_len / 4) / 128) * 128;
  const pattern = c.window_pattern.toUpperCase();
  return Array.from({ length: c.n_layer }, (_, i) => {
    const kind = i === c.n_layer - 1 ? "L" : pattern[i % pattern.length];
    return kind === "L" ? c.sequence_len : short;
  });
}

// [layers of a scanned group, groups], as model/transformer.py has it.
function group_size(c) {
  const pattern = c.window_pattern.length;
  const period = c.value_embeds && pattern % 2 ? 2 * pattern : pattern;
  const seen = windows(c);
  let groups = floor_div(c.n_layer, period);
  if (seen.slice(0, groups * period).some((window, i) => window !== seen[i % period])) groups -= 1;
  return [period, c.scan_layers && groups > 1 ? groups : 0];
}

// How many layers have value embeddings: every other one, the last included.
const value_layers = (c) => (c.value_embeds ? Math.ceil((c.n_layer - ((c.n_layer - 1) % 2)) / 2) : 0);

function scaling_params(c) {
  const attention = 2 * c.n_embd * (c.n_head + c.n_kv_head) * c.head_dim;
  const mlp = (c.mlp === "swiglu" ? 3 : 2) * c.n_embd * c.mlp_dim;
  const gates = value_layers(c) * DATA.VALUE_GATE_CHANNELS * c.n_kv_head;
  return c.n_layer * (attention + mlp) + gates + c.n_embd * padded_vocab(c);
}

function flops_per_token(c) {
  const scores = sum(windows(c).map((w) => 12 * c.n_head * c.head_dim * Math.min(w, c.sequence_len)));
  return 6 * (scaling_params(c) + (c.smear ? DATA.SMEAR_CHANNELS : 0)) + scores;
}

// ---- params.py ----------------------------------------------------------------------------------

// [shape, group, inputs of a matrix: how many axes after the first] of every weight.
function param_specs(c) {
  const [L, D, N, K, H, F] = [c.n_layer, c.n_embd, c.n_head, c.n_kv_head, c.head_dim, c.mlp_dim];
  const [V, Lv] = [padded_vocab(c), value_layers(c)];
  const specs = [
    [[L, D, N, H], "matrix", 1],
    [[L, D, K, H], "matrix", 1],
    [[L, D, K, H], "matrix", 1],
    [[L, N, H, D], "matrix", 2],
    [[L, D, F], "matrix", 1],
    [[L, F, D], "matrix", 1],
  ];
  if (c.mlp === "swiglu") specs.push([[L, D, F], "matrix", 1]);
  if (c.resid_scales) specs.push([[L], "resid", 1]);
  if (c.x0_scales) specs.push([[L], "x0", 1]);
  if (c.value_embeds) specs.push([[Lv, DATA.VALUE_GATE_CHANNELS, K], "matrix", 1]);
  specs.push([[V, D], c.tied_head ? "head" : "embed", 1]);
  if (!c.tied_head) specs.push([[D, V], "head", 1]);
  if (c.value_embeds) specs.push([[Lv, V, K, H], "value_embed", 1]);
  if (c.smear) specs.push([[DATA.SMEAR_CHANNELS], "smear", 1], [[], "smear", 1]);
  if (c.backout) specs.push([[], "smear", 1]);
  return specs;
}

function count_params(c) {
  const counts = { embed: 0, value_embeds: 0, head: 0, blocks: 0, scalars: 0 };
  const part = { embed: "embed", value_embed: "value_embeds", head: "head", matrix: "blocks" };
  for (const [shape, group] of param_specs(c)) counts[part[group] ?? "scalars"] += product(shape);
  return { ...counts, total: sum(Object.values(counts)) };
}

// [layers, inputs, outputs] of a stacked matrix.
function matrix_shape([shape, , n_in]) {
  return [shape[0], product(shape.slice(1, 1 + n_in)), product(shape.slice(1 + n_in))];
}

// ---- memory.py ----------------------------------------------------------------------------------

// The step of one device, as if it were alone: its rows, its heads, its part of the mlp and of the
// positions that the loss reads.
function config_of_share(c, rows, tensor) {
  const microbatch = Math.max(1, floor_div(c.microbatch, rows));
  const kv_heads = Math.max(1, floor_div(c.n_kv_head, tensor));
  const tokens = microbatch * c.sequence_len;
  return {
    ...c,
    microbatch,
    total_batch_size: tokens * accumulate(c),
    n_kv_head: kv_heads,
    n_head: kv_heads * floor_div(c.n_head, c.n_kv_head),
    mlp_dim: Math.max(1, floor_div(c.mlp_dim, tensor)),
    loss_chunk: Math.min(c.loss_chunk, Math.max(1, floor_div(tokens, tensor))),
  };
}

// Momenta as large as the weights; second moments too, but for Muon's matrices; and the schedule's
// scalars.
function optimizer_bytes(c) {
  let numbers = DATA.HYPER_SCALARS;
  for (const spec of param_specs(c)) {
    const size = product(spec[0]);
    const [layers, inputs, outputs] = matrix_shape(spec);
    const reduced = spec[1] === "matrix" && c.optimizer === "muon";
    numbers += size + (reduced ? layers * Math.max(inputs, outputs) : size);
  }
  return 4 * numbers;
}

// Bytes beside the state, by part: gradients, and all that comes and goes at a step's peak.
function working_bytes(share, split) {
  const tokens = share.microbatch * share.sequence_len;
  const kept = tokens * kept_per_token(share, split.tensor) * itemsize(share);
  const weights = copied_bytes(share, split.fsdp) + gathered_bytes(share, split.fsdp);
  const at_peak = Math.max(loss_bytes(share), layer_bytes(share, split.fsdp));
  return {
    gradients: floor_div(4 * count_params(share).total, split.fsdp),
    activations: kept + weights + at_peak,
  };
}

// Numbers that forward keeps of each token of a microbatch.
function kept_per_token(c, tensor) {
  const products = products_per_token(c);
  const unscanned = products + 2 * c.n_embd + heads_per_token(c);
  const per_layer = {
    layer: c.n_embd,
    dots: products,
    none: group_size(c)[1] ? whole_layer_per_token(c) : unscanned,
  }[c.remat];
  const shared = tensor > 1 ? c.n_embd : 0;
  const lines = value_layers(c) * c.n_kv_head * c.head_dim;
  return (per_layer + shared) * c.n_layer + 4 * c.n_embd + lines;
}

// What all microbatches read, made once.
function copied_bytes(c, fsdp) {
  if (accumulate(c) === 1) return 0;
  const counts = count_params(c);
  const matrices = itemsize(c) < 4 ? itemsize(c) * (counts.blocks + counts.head) : 0;
  return floor_div(matrices, fsdp) + (fsdp === 1 ? itemsize(c) * counts.value_embeds : 0);
}

// What devices that each hold a part have whole at a time.
function gathered_bytes(c, fsdp) {
  if (fsdp === 1) return 0;
  const [period, groups] = group_size(c);
  const layers = floor_div(count_params(c).blocks * (groups ? period : 1), c.n_layer);
  return 4 * padded_vocab(c) * c.n_embd + (4 + itemsize(c)) * layers;
}

// A chunk of logits, whose gradient a TPU never writes, and the head's gradient.
function loss_bytes(c) {
  const tokens = Math.min(c.loss_chunk, c.microbatch * c.sequence_len);
  return tokens * padded_vocab(c) * itemsize(c) + head_gradient_bytes(c);
}

// The layer that backward computes again, and a microbatch's own gradients.
function layer_bytes(c, fsdp) {
  const again = c.remat === "none" ? 0 : whole_layer_per_token(c);
  const computed = c.microbatch * c.sequence_len * again * itemsize(c);
  if (accumulate(c) === 1) return computed;
  const blocks = itemsize(c) * count_params(c).blocks;
  return computed + floor_div(blocks, fsdp) + head_gradient_bytes(c);
}

const head_gradient_bytes = (c) => (accumulate(c) > 1 ? 4 * count_params(c).head : 0);

// Numbers of a layer's input, of what its products make, and of what was attended.
function products_per_token(c) {
  const mlp = (c.mlp === "swiglu" ? 2 : 1) * c.mlp_dim;
  return c.n_embd + heads_per_token(c) + c.n_head * c.head_dim + mlp;
}

// Numbers of queries, keys and values.
const heads_per_token = (c) => (c.n_head + 2 * c.n_kv_head) * c.head_dim;

// Numbers of all that a layer makes.
const whole_layer_per_token = (c) => 2 * (products_per_token(c) + c.n_embd + c.mlp_dim);

// ---- roofline.py --------------------------------------------------------------------------------

const KERNELS = ["splash", "pallas"];
const RECOMPUTED = { none: 0, dots: 0, layer: 1 };
const COMPONENTS = ["embedding", "attention", "mlp", "head+loss", "optimizer", "collectives", "other"];

const rows_of = (split) => split.data * split.fsdp;
const devices_of = (split) => split.data * split.fsdp * split.tensor;
const step_tokens = (c, split) => c.total_batch_size / rows_of(split);
const passes = (c) => 3 + RECOMPUTED[c.remat];
const weight_bytes = (c, count) => count * accumulate(c) * passes(c) * itemsize(c);

function add(work, flops, busy, bytes) {
  work.flops += flops;
  work.busy += busy;
  work.bytes += bytes;
}

// How many blocks of keys all blocks of queries look at.
function visits(length, window, block) {
  let total = 0;
  for (let i = 0; i < floor_div(length, block); i++) {
    total += i - floor_div(Math.max(0, i * block - window), block) + 1;
  }
  return total;
}

// Positions per block of a kernel: the largest multiple of a tile that divides the length.
function block_size(c) {
  const tile = DATA.KERNEL_TILE;
  const limit = Math.min(c.sequence_len, c.attention_block || DATA.BLOCKS[c.attention]);
  let block = tile;
  for (let size = tile; size <= Math.max(tile, limit); size += tile) {
    if (c.sequence_len % size === 0) block = size;
  }
  return block;
}

// What one attention kernel of every layer does for one row, as the mean over layers.
function kernel_work(c, forward, matrix_unit) {
  const block = block_size(c);
  const pairs = sum(windows(c).map((w) => visits(c.sequence_len, w, block))) / c.n_layer;
  const filled = Math.ceil(c.head_dim / matrix_unit) * matrix_unit;
  const [over_width, over_block] = forward ? [1, 1] : [2, 3];
  const flops = 2 * pairs * block * block * c.n_head * c.head_dim;
  const reread = Math.max(0, pairs * block - c.sequence_len);
  return {
    flops: flops * (over_width + over_block),
    busy: flops * (over_width / (c.head_dim / filled) + over_block),
    bytes: reread * 2 * c.n_head * c.head_dim * itemsize(c),
  };
}

// What a step does per device, from shapes alone.
function account(c, matrix_unit, split, strategy) {
  const work = Object.fromEntries(COMPONENTS.map((name) => [name, { flops: 0, busy: 0, bytes: 0 }]));
  add_attention(work.attention, c, split, matrix_unit);
  add_mlp(work.mlp, c, split);
  add_head(work["head+loss"], c, split);
  add_embedding(work.embedding, c, split);
  add_optimizer(work.optimizer, c, split, strategy);
  add_between(work.other, c, split);
  return work;
}

function add_attention(work, c, split, matrix_unit) {
  const [layers, width] = [c.n_layer, c.n_embd];
  const [tokens, tensor, again] = [step_tokens(c, split), split.tensor, RECOMPUTED[c.remat]];
  const [q, kv] = [c.n_head * c.head_dim, c.n_kv_head * c.head_dim];

  // projections
  const weights = width * (2 * q + 2 * kv);
  const recomputed = c.remat === "dots" ? 2 * q * width : 2 * weights * again;
  const arrays = tokens * itemsize(c) * passes(c) * (5 * width * tensor + 6 * (q + kv));
  const flops = (layers * tokens * (6 * weights + recomputed)) / tensor;
  add(work, flops, flops, (layers * (weight_bytes(c, weights) + arrays)) / tensor);

  // scores of all pairs, in float32, written or read four times in all
  if (!KERNELS.includes(c.attention)) {
    const pairs = sum(windows(c).map((w) => Math.min(w, c.sequence_len) + 1));
    const scored = ((12 + 4 * again) * pairs * tokens * q) / tensor;
    add(work, scored, scored, (4 * 4 * pairs * tokens * c.n_head) / tensor);
    return;
  }

  // kernels keep them on chip; splash writes the log-sum-exp 128 times in float32
  const rows = (layers * tokens) / c.sequence_len;
  for (const [forward, runs] of [[true, 1 + again], [false, 1]]) {
    const kernel = kernel_work(c, forward, matrix_unit);
    const times = (runs * rows) / tensor;
    add(work, kernel.flops * times, kernel.busy * times, kernel.bytes * times);
  }
  const lanes = c.attention === "splash" ? 512 : 4;
  add(work, 0, 0, (layers * tokens * c.n_head * lanes * 2) / tensor);
}

function add_mlp(work, c, split) {
  const [layers, width, wide] = [c.n_layer, c.n_embd, c.mlp_dim];
  const [tokens, tensor, again] = [step_tokens(c, split), split.tensor, RECOMPUTED[c.remat]];
  const weights = (c.mlp === "swiglu" ? 3 : 2) * width * wide;
  const narrow_arrays = passes(c) * width * (tensor > 1 ? 5 * tensor : 2);
  const wide_arrays = (8 + 2 * again) * wide;
  const arrays = tokens * itemsize(c) * (narrow_arrays + wide_arrays);
  const flops = (layers * tokens * (6 + 2 * again) * weights) / tensor;
  add(work, flops, flops, (layers * (weight_bytes(c, weights) + arrays)) / tensor);
}

function add_head(work, c, split) {
  const [width, vocabulary, tokens] = [c.n_embd, padded_vocab(c), step_tokens(c, split)];
  const chunks = Math.ceil(tokens / accumulate(c) / c.loss_chunk);
  const weights = accumulate(c) * width * vocabulary * (chunks * 2 * itemsize(c) + 8);
  const logits = (tokens * vocabulary * 3 * itemsize(c)) / split.tensor;
  const flops = (6 * tokens * width * vocabulary) / split.tensor;
  add(work, flops, flops, weights + logits);
}

function add_embedding(work, c, split) {
  add(work, 0, 0, step_tokens(c, split) * c.n_embd * (4 + 3 * itemsize(c) + 8));
}

// Sums of gradients, value embeddings, what a scan stacks.
function add_between(work, c, split) {
  const [tokens, counts] = [step_tokens(c, split), count_params(c)];
  if (accumulate(c) > 1) {
    const summed = (counts.blocks / split.tensor + counts.head) / split.fsdp;
    add(work, 0, 0, accumulate(c) * summed * (8 + itemsize(c)));
  }
  const lines = (value_layers(c) * c.n_kv_head * c.head_dim) / split.tensor;
  add(work, 0, 0, tokens * lines * (8 * itemsize(c) + 20));
  if (group_size(c)[1]) {
    const share = config_of_share(c, rows_of(split), split.tensor);
    add(work, 0, 0, tokens * kept_per_token(share, split.tensor) * itemsize(c) * 2);
  }
}

function add_optimizer(work, c, split, strategy) {
  const shared = ["zero", "fsdp", "tp"].includes(strategy) ? devices_of(split) : 1;
  for (const spec of param_specs(c)) {
    const size = product(spec[0]);
    if (spec[1] !== "matrix" || c.optimizer !== "muon") {
      add(work, 0, 0, (28 * size) / shared);
      continue;
    }
    const [layers, inputs, outputs] = matrix_shape(spec);
    const flops = (layers * polar_work(inputs, outputs, itemsize(c))) / devices_of(split);
    add(work, flops, flops, (size * (20 + 16 * itemsize(c) + 8)) / devices_of(split));
  }
}

// FLOPs to orthogonalise one matrix, as Muon does.
function polar_work(inputs, outputs, size) {
  const [short, long] = [Math.min(inputs, outputs), Math.max(inputs, outputs)];
  if (size === 4 && long >= 2 * short) {
    return 2 * short * short * long * 2 + 5 * 2 * 3 * short ** 3 + 4 * 2 * short ** 3;
  }
  return 5 * (4 * short * short * long + 2 * short ** 3);
}

// Bytes that each device of a ring sends in a collective over `whole` bytes of its own.
function sent_bytes(kind, whole, devices) {
  const factors = {
    "all-reduce": (2 * (devices - 1)) / devices,
    "all-gather": devices - 1,
    "reduce-scatter": (devices - 1) / devices,
  };
  return whole * factors[kind];
}

// Bytes that each device sends in a step.
function sent(c, split, strategy) {
  if (devices_of(split) === 1) return 0;
  const count = count_params(c).total;
  const gradients = (4 * count) / split.tensor;
  const summed = sent_bytes("all-reduce", gradients, split.data);
  if (strategy === "tp") {
    const activations = step_tokens(c, split) * c.n_embd * itemsize(c);
    const sums = c.n_layer * (c.remat === "none" ? 4 : 5);
    return summed + sums * sent_bytes("all-reduce", activations, split.tensor);
  }
  if (strategy === "fsdp") {
    const share = (itemsize(c) * count) / split.fsdp;
    const gathered = 2 * sent_bytes("all-gather", share, split.fsdp);
    const scattered = sent_bytes("reduce-scatter", 4 * count, split.fsdp);
    const replicas = sent_bytes("all-reduce", gradients / split.fsdp, split.data);
    return accumulate(c) * (gathered + scattered) + replicas;
  }
  return summed;
}

// The least time of a step: its components one after the other, each waiting for what takes longest.
function bound_seconds(work, chip, bytes_sent) {
  return sum(Object.entries(work).map(([name, { busy, bytes }]) => {
    const times = [busy / chip.flops, bytes / chip.bandwidth];
    if (name === "collectives" && bytes_sent) times.push(bytes_sent / chip.network);
    return Math.max(...times);
  }));
}

// ---- estimate.py --------------------------------------------------------------------------------

// How the devices share the work: all on the strategy's own axis.
function make_split(chips, strategy) {
  const split = { data: 1, fsdp: 1, tensor: 1 };
  if (chips > 1) split[DATA.MESH_AXIS[strategy]] = chips;
  return split;
}

function memory_of_share(c, split, strategy) {
  const share = config_of_share(c, rows_of(split), split.tensor);
  const parameters = 4 * count_params(share).total;
  const replicas = strategy === "dp" ? 1 : split.data;
  const memory = {
    parameters: floor_div(parameters, split.fsdp),
    optimizer: floor_div(optimizer_bytes(share), split.fsdp * replicas),
    ...working_bytes(share, split),
  };
  // zero gathers the updates when activations and whole gradients are gone
  if (strategy === "zero") {
    const update = parameters + floor_div(parameters, replicas);
    memory.gradients += Math.max(0, update - memory.gradients - memory.activations);
  }
  return memory;
}

// `config` with what "auto" means on a chip named.
function for_chip(c, chip) {
  return { ...c, attention: chip.attention, compute_dtype: chip.compute_dtype };
}

// The report of a step on a slice: {kind, chips} of DATA.slices.
function estimate(config, where, strategy) {
  const chip = DATA.chips[where.kind];
  const c = for_chip(config, chip);
  const split = make_split(where.chips, strategy);
  const memory = memory_of_share(c, split, strategy);
  const work = account(c, chip.matrix_unit, split, strategy);
  const seconds = bound_seconds(work, chip, sent(c, split, strategy));
  const peak = sum(Object.values(memory));
  return {
    memory,
    peak,
    available: chip.available,
    fits: peak <= chip.available,
    seconds,
    flops: sum(Object.values(work).map((part) => part.flops)),
    mfu: (flops_per_token(c) * c.total_batch_size) / seconds / chip.flops / where.chips,
    tokens_per_s: c.total_batch_size / seconds,
  };
}

// What of a model a number of devices does not divide, in a sentence; empty where all is well.
function why_not(c, chips, strategy) {
  const split = make_split(chips, strategy);
  if (c.microbatch % rows_of(split)) return `${chips} devices do not divide ${c.microbatch} rows`;
  if (split.tensor > 1) {
    for (const name of ["n_kv_head", "mlp_dim", "sequence_len"]) {
      if (c[name] % split.tensor) return `tp: ${chips} devices do not divide ${name}=${c[name]}`;
    }
  }
  if (split.fsdp > 1) {
    const sizes = { n_embd: c.n_embd, "the padded vocabulary": padded_vocab(c) };
    for (const [name, size] of Object.entries(sizes)) {
      if (size % split.fsdp) return `fsdp: ${chips} devices do not divide ${name}=${size}`;
    }
  }
  return "";
}

// ---- plan.py ------------------------------------------------------------------------------------

// Tokens, hours and dollars of a whole run; null where a price is not known.
function plan(c, where, mfu) {
  const chip = DATA.chips[where.kind];
  const tokens = c.num_steps * c.total_batch_size;
  const flops = flops_per_token(c) * tokens;
  const hours = flops / (chip.flops * where.chips * mfu) / 3600;
  const cost = {};
  for (const [how, price] of Object.entries(chip.prices)) {
    cost[how] = price ? price * where.chips * hours : null;
  }
  return { tokens, steps: c.num_steps, flops, hours, cost };
}

// ---- compiled truths ----------------------------------------------------------------------------

// What the compiler said of exactly this step, or undefined.
function compiled(config, where, strategy) {
  const c = for_chip(config, DATA.chips[where.kind]);
  return DATA.compiled.find((answer) => {
    if (answer.topology !== where.topology) return false;
    if (where.chips > 1 && answer.strategy !== strategy) return false;
    return Object.entries(answer.config).every(([name, value]) => c[name] === value);
  });
}
