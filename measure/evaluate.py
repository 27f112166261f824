"""Where does a model stand?  The three diagnostics of Cola DLM, its likelihood, and the paper's eight benchmarks.

    python -m measure.evaluate                                            # diagnostics of runs/cola
    python -m measure.evaluate --model released --tasks lambada,mmlu      # benchmarks; see benchmarks.py
    python -m measure.evaluate --score lambada.jsonl mmlu.jsonl           # score generations that exist already
    torchrun --nproc_per_node=8 -m measure.evaluate                       # on 8 devices, and so with --tasks

Each diagnostic tests one part.  Reconstruction: does the decoder recover the text from the latents?  Compression:
how much do the latents hold?  Prior fit: does the prior match the latents?  Last comes what they make together, the
likelihood.  Every figure has a standard error by the delete-a-group jackknife over sequences (one formula for means and
for everything that is none), and says on how many sequences it rests.
"""

if __name__ == "__main__":
    import extras.quiet  # noqa: F401

import importlib.util
import json
import math
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from tqdm import tqdm

import data
from cola import ColaDLM
from common import (
    check_new,
    collect,
    first_process_first,
    join_processes,
    n_processes,
    pick_device,
    rank,
    replacing,
    run_script,
    sampling_precision,
)
from extras.compiled import CompiledColaDLM
from flow import flow_matching_loss, solve, velocity_of_all_blocks
from measure import benchmarks, judge
from measure.likelihood import LogWeights, log_weights
from options import RELEASED, TextOptions, flag, option, parse_options
from released_format import weight_files
from training import own_data
from vae import Posterior

# ----------------------------------------------------------------------------------------------------------------------
# Figures


def jackknife(statistic, n, groups=20):
    """The value of statistic(kept) for all of n sequences, and its standard error.

    kept: a LongTensor of sequence numbers.  Leaving out one of G groups at a time gives G values; their variance times
    (G - 1)^2 / G estimates that of the whole.  For a mean with groups of one it is the usual standard error.  The
    statistic may return a tensor; so do value and error then."""
    order = torch.arange(n)
    groups = min(groups, n)

    def evaluated(kept):
        return torch.as_tensor(statistic(kept)).cpu().double()  # in this order: not every device has float64

    value = evaluated(order)
    if groups < 2:
        return value, torch.full_like(value, math.nan)
    values = [evaluated(order[order % groups != g]) for g in range(groups)]
    return value, torch.stack(values).var(0, unbiased=False).mul(groups - 1).sqrt()


@dataclass
class Report:
    """Figures by section, printed as they come and kept in report.json."""

    folder: Path
    about: dict
    sections: dict = field(default_factory=dict)

    def add(self, section, name, estimate, n, unit, x=None):
        """estimate: (value, standard error) from `jackknife`; two tensors, if x names the points of a curve."""
        value, error = (tensor.tolist() for tensor in estimate)
        if not all(tensor.isfinite().all() for tensor in estimate):
            raise ValueError(f"{section}, {name}: {value} ± {error} is not finite: is the model damaged?")
        entry = dict(value=value, se=error, n=n, unit=unit) | ({} if x is None else dict(x=x))
        if section not in self.sections:
            print(f"\n{section}")
        self.sections.setdefault(section, {})[name] = entry
        if x is None:
            print(f"  {name:44} {value:10.4f} ± {error:.4f} {unit} (n = {n})")
        else:
            points = [f"{point:4g}: {v:.3f}" for point, v in zip(x, value, strict=True)]
            lines = [" ".join(points[i : i + 8]) for i in range(0, len(points), 8)]
            print(f"  {name}, each ± {max(error):.4f} or less {unit} (n = {n})", *lines, sep="\n      ")
        if rank() == 0:
            with replacing(self.folder / "report.json") as temporary:
                content = self.about | dict(sections=self.sections)
                temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def in_batches(function, *tensors, batch_size=32):
    """Call the function on batches of rows and concatenate what it returns."""
    parts = [function(*rows) for rows in zip(*(t.split(batch_size) for t in tensors), strict=True)]
    return torch.cat(parts) if torch.is_tensor(parts[0]) else sum(parts, [])


def noise_like(x, seed):
    """Draws from N(0, I), the same on every device."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.device)


# ----------------------------------------------------------------------------------------------------------------------
# Reconstruction


def reconstruction(report, model, idx, seed):
    """Does the decoder recover the text from the latent?  idx (N, L) held-out tokens."""
    vae, N = model.vae, len(idx)
    found = in_batches(lambda x: vae.likeliest(vae.encode(x).mu), idx)
    right = (found == idx).float()  # (N, L)
    z0 = in_batches(lambda x, e: vae.encode(x).at(e), idx, noise_like(empty_latents(model, idx), seed))
    nats = -in_batches(vae.log_likelihood, z0, idx)
    texts = [[words_of(model.tokenizer, row) for row in rows.tolist()] for rows in (found, idx)]
    counts = torch.tensor([ngram_matches(a, b) for a, b in zip(*texts, strict=True)], dtype=torch.float64)
    rouge = torch.tensor([rouge_l(a, b) for a, b in zip(*texts, strict=True)])

    name = "reconstruction"
    report.add(name, "token accuracy", jackknife(lambda i: right[i].mean(), N), N, "")
    report.add(name, "sequences without error", jackknife(lambda i: right[i].all(1).float().mean(), N), N, "")
    report.add(name, "cross-entropy", jackknife(lambda i: nats[i].mean(), N), N, "nats/token")
    report.add(name, "BLEU-4", jackknife(lambda i: bleu(counts[i].sum(0)), N), N, "")
    report.add(name, "ROUGE-L", jackknife(lambda i: rouge[i].mean(), N), N, "")

    times = [i / 20 for i in range(21)]
    z1 = noise_like(z0, seed + 1)

    def read_at(t):
        return in_batches(lambda z, e, x: vae.likeliest(torch.lerp(z, e, t)) == x, z0, z1, idx)

    right = torch.stack([read_at(t) for t in times]).float()  # (21, N, L)
    report.add(name, "accuracy by noise level t", jackknife(lambda i: right[:, i].mean((1, 2)), N), N, "", times)


def empty_latents(model, idx):
    """A tensor of the shape of the latents of idx."""
    c = model.vae.config
    return torch.empty(len(idx), idx.shape[1] // c.patch_size, c.latent_dim, device=idx.device)


def words_of(tokenizer, ids):
    return judge.text_of(tokenizer, ids).decode(errors="replace").split()


def ngram_matches(found, wanted):
    """What BLEU needs of one pair of word lists: matches and n-grams for n = 1 to 4, and both lengths."""
    row = []
    for n in range(1, 5):
        a, b = (Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in (found, wanted))
        row += [(a & b).total(), a.total()]
    return [*row, len(found), len(wanted)]


def bleu(counts):
    """Corpus BLEU (Papineni et al. 2002) from the summed rows of `ngram_matches`."""
    *pairs, found, wanted = counts.tolist()
    if min(pairs) == 0:
        return 0.0
    precision = sum(math.log(match / total) for match, total in zip(pairs[::2], pairs[1::2], strict=True)) / 4
    return math.exp(precision + min(0.0, 1 - wanted / found))


def rouge_l(found, wanted):
    """F1 of the longest common subsequence of two word lists (Lin 2004)."""
    best = [0] * (len(wanted) + 1)
    for a in found:
        before = best[:]
        for j, b in enumerate(wanted):
            best[j + 1] = before[j] + 1 if a == b else max(before[j + 1], best[j])
    return 2 * best[-1] / max(len(found) + len(wanted), 1)


# ----------------------------------------------------------------------------------------------------------------------
# Compression

ACTIVE = 0.01  # a latent dimension counts as active if the variance of mu over the data is above (arXiv:1509.00519)
MIXTURE = 2048  # latents of the aggregate posterior at most


def compression(report, model, idx, seed):
    """How much does the latent hold?  idx (N, L)"""
    p, N = model.vae.config.patch_size, len(idx)
    mu, logvar = in_batches(lambda x: torch.stack([(q := model.vae.encode(x)).mu, q.logvar], 1), idx).unbind(1)
    channels = zip(mu.split(1, dim=-1), logvar.split(1, dim=-1), strict=True)
    kl = torch.stack([Posterior(*channel).kl() for channel in channels], dim=-1)  # (N, n, d)

    name = "compression"
    report.add(name, "KL", jackknife(lambda i: kl[i].sum(-1).mean() / p, N), N, "nats/token")
    report.add(name, "KL in bits", jackknife(lambda i: kl[i].sum(-1).mean() / p / math.log(2), N), N, "bits/token")
    report.add(name, "log SNR", jackknife(lambda i: Posterior(mu[i], logvar[i]).log_snr(), N), N, "")
    active = jackknife(lambda i: (mu[i].flatten(0, 1).var(0) > ACTIVE).sum(), N)
    report.add(name, f"active dimensions of {kl.shape[-1]}", active, N, "")

    per_row = min(max(MIXTURE // N, 1), mu.shape[1])
    places = torch.linspace(0, mu.shape[1] - 1, per_row).long()
    row = torch.arange(N).repeat_interleave(per_row)
    mixture = [x[:, places].flatten(0, 1).cpu().double() for x in (mu, logvar)]  # 2 of (M, d)
    log_ratio = log_posteriors(*mixture, noise_like(mixture[0], seed))

    def information(kept):
        chosen = torch.isin(row, kept).nonzero()[:, 0]
        return mutual_information(log_ratio[chosen][:, chosen])

    M = len(row)
    report.add(name, f"I(X; Z), at most {math.log(M):.2f}", jackknife(information, N), M, "nats/latent")
    kl_mixture = kl[:, places].sum(-1).cpu()
    rest = jackknife(lambda i: kl_mixture[i].mean() - information(i), N)
    report.add(name, "KL(q(z) || N(0, I)), at most", rest, M, "nats/latent")
    each = jackknife(lambda i: kl[i].mean((0, 1)), N)
    report.add(name, "KL by dimension", each, N, "nats/latent", list(range(kl.shape[-1])))


def log_posteriors(mu, logvar, eps):
    """log q(z_i | x_j) of z_i = mu_i + sigma_i eps_i under every posterior j, up to one constant: (M, M)."""
    z, precision = mu + torch.exp(0.5 * logvar) * eps, torch.exp(-logvar)
    squares = z.square() @ precision.T - 2 * z @ (mu * precision).T + (mu.square() * precision).sum(-1)
    return -0.5 * (squares + logvar.sum(-1))


def mutual_information(log_q):
    """I(X; Z) = E log q(z | x) / q(z) in nats, from log_q (M, M) of `log_posteriors`, with q(z) the mean of all M.

    The posterior that z came from is among them, so the estimate cannot exceed log M.  It is too low, and the marginal
    KL too high, the more so the closer it comes to that."""
    return (log_q.diagonal() - log_q.logsumexp(1)).mean() + math.log(len(log_q))


# ----------------------------------------------------------------------------------------------------------------------
# Prior fit


def prior_fit(report, model, idx, before, corpus, settings, seed):
    """Does the prior match the latents?  idx (N, L); before: the tokens before each row, lists of ids."""
    N, dit, block_size = len(idx), model.dit, model.dit.config.block_size
    eps = noise_like(empty_latents(model, idx), seed)
    z0 = in_batches(lambda x, e: model.vae.to_dit(model.vae.encode(x).at(e)), idx, eps)  # (N, n, d)
    bins = [i / 10 for i in range(10)]
    z1, u = noise_like(z0, seed + 1), torch.rand(N, generator=torch.Generator().manual_seed(seed)).to(z0.device)

    def alone(x):
        """Every block as a row of its own: no history."""
        return x.unflatten(1, (-1, block_size)).flatten(0, 1)

    def error(z0, z1, t):  # (B, 2): with history, and without
        with_history = flow_matching_loss(dit, z0, z1, t, reduce=False).mean(1)
        t = t.repeat_interleave(z0.shape[1] // block_size)
        without = flow_matching_loss(dit, alone(z0), alone(z1), t, reduce=False)
        return torch.stack([with_history, without.unflatten(0, (len(z0), -1)).mean((1, 2))], dim=1)

    errors = torch.stack([in_batches(error, z0, z1, start + 0.1 * u) for start in bins])  # (10, N, 2)
    name = "prior fit"
    report.add(name, "flow-matching loss, t uniform", jackknife(lambda i: errors[:, i, 0].mean(), N), N, "")
    for column, what in enumerate(("loss", "loss without history")):
        losses = errors[:, :, column]
        report.add(name, f"{what} by time t", jackknife(lambda i: losses[:, i].mean(1), N), N, "", bins)  # noqa: B023

    half = N // 2
    real, others = z0[0 : 2 * half : 2], z0[1 : 2 * half : 2]
    reader = judge.NGramJudge(judge.training_text(corpus))
    prompts = before[: 2 * half : 2]  # those of the real ones: generated text continues what held-out text continues
    contexts = [judge.text_of(corpus.tokenizer, row) for row in prompts]
    candidates = {"held-out text": (real, idx[: 2 * half : 2].tolist())}
    for scale in sorted({1.0, settings["cfg_scale"]}):
        options = settings | dict(cfg_scale=scale, max_new_tokens=idx.shape[1])
        candidates[f"generated, guidance {scale:g}"] = generated(model, prompts, **options)
    for what, (latents, rows) in candidates.items():
        texts = [judge.text_of(corpus.tokenizer, row) for row in rows]
        for distance in (frechet_distance, energy_distance):
            estimate = jackknife(lambda i: distance(latents[i], others[i]), half)  # noqa: B023
            report.add(name, f"{distance.__name__.replace('_', ' ')}, {what}", estimate, half, "")
        bits = torch.tensor([reader.bits(text, context) for text, context in zip(texts, contexts, strict=True)])
        sizes = torch.tensor([len(text) for text in texts])
        estimate = jackknife(lambda i: bits[i].sum() / sizes[i].sum(), half)  # noqa: B023
        report.add(name, f"n-gram judge, {what}", estimate, half, "bits/byte")


def generated(model, prompts, max_new_tokens, **settings):
    """Latents (B, n, d) and tokens, B lists, of continuations of equally long prompts, lists of ids.

    The prompts are shared out over the processes."""
    p, rows = model.vae.config.patch_size, range(rank(), len(prompts), n_processes())
    block_size = settings.get("block_size") or model.dit.config.block_size
    blocks = list(model.generate_blocks([prompts[i] for i in rows], max_new_tokens, row_ids=rows, **settings))
    known = -(-len(prompts[0]) // p) % block_size  # latents of the first block
    found = []
    for i in range(len(rows)):
        z = torch.cat([block.z[i] for block in blocks])[known:][: max_new_tokens // p]  # (n, d)
        found.append((z.cpu(), sum((block.new[i] for block in blocks), [])[:max_new_tokens]))
    latents, tokens = zip(*collect(found), strict=True)
    return torch.stack(latents), list(tokens)


def frechet_distance(a, b):
    """Of two sets of latents (N, n, d) as Gaussians: |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))."""
    a, b = (x.flatten(0, 1).cpu().double() for x in (a, b))
    cov_a, cov_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def energy_distance(a, b):
    """2 E|x - y| - E|x - x'| - E|y - y'| of two sets of latents (N, n, d), without bias; 0 for equal distributions."""
    a, b = (x.flatten(0, 1)[:: max(x.shape[0] * x.shape[1] // 2000, 1)].cpu().double() for x in (a, b))

    def within(x):
        return torch.cdist(x, x).sum() / (len(x) * (len(x) - 1))

    return (2 * torch.cdist(a, b).mean() - within(a) - within(b)).item()


# ----------------------------------------------------------------------------------------------------------------------
# Likelihood


def likelihood(report, model, idx, o):
    """log p(x) of idx (N, L): ELBO and IWAE with o.samples draws, by the time at which the decoder reads.

    The rows are shared out over the processes, eight at a time."""
    N, ids = len(idx), idx.tolist()
    n_bytes = torch.tensor([len(judge.text_of(model.tokenizer, row)) for row in ids])
    name = "likelihood"
    for read_time in o.read_times:
        options = dict(n_samples=o.samples, steps=o.ode_steps, read_time=read_time, exact=o.exact, seed=o.seed)
        batches = range(0, N, 8)[rank() :: n_processes()]
        weights = [
            torch.stack(log_weights(model, ids[i : i + 8], row_ids=range(i, min(i + 8, N)), **options)).cpu()
            for i in tqdm(batches, desc=f"likelihood at t = {read_time}", leave=False, disable=rank() > 0)
        ]
        terms = LogWeights(*torch.cat(collect(weights), dim=-1).double())  # (K, N) each
        for what, term in terms._asdict().items():
            estimate = jackknife(lambda i: term[:, i].mean() / idx.shape[1], N)  # noqa: B023
            report.add(name, f"t = {read_time}: log-density of {what}", estimate, N, "nats/token")
        bounds = {"ELBO": terms.total.mean(0)}
        if o.samples > 1:
            log_mean = terms.total.logsumexp(0) - math.log(o.samples)
            bounds[f"IWAE-{o.samples}" + ("" if o.exact else ", no bound")] = log_mean
        for what, log_p in bounds.items():
            bits = jackknife(lambda i: -log_p[i].sum() / math.log(2) / n_bytes[i].sum(), N)  # noqa: B023
            report.add(name, f"t = {read_time}: {what}", bits, N, "bits/byte")
            perplexity = jackknife(lambda i: torch.exp(-log_p[i].mean() / idx.shape[1]), N)  # noqa: B023
            report.add(name, f"t = {read_time}: {what} perplexity", perplexity, N, "per token")


# ----------------------------------------------------------------------------------------------------------------------
# Figures as pictures


def plot(folder, sections, model, idx, seed):
    """Write PNG files of the curves, and of latents with a few of the ways that the flow takes.  Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    def save(name, x_label, y_label):
        plt.xlabel(x_label)
        plt.ylabel(y_label)
        plt.tight_layout()
        plt.savefig(folder / f"{name}.png", dpi=150)
        plt.close()
        print(folder / f"{name}.png")

    def curve(section, name):
        entry = sections[section][name]
        plt.errorbar(entry["x"], entry["value"], entry["se"], capsize=2, label=name.removesuffix(" by time t"))

    if "reconstruction" in sections:
        curve("reconstruction", "accuracy by noise level t")
        save("noise_robustness", "noise level t of the latents", "token accuracy of the decoder")
    if "compression" in sections:
        entry = sections["compression"]["KL by dimension"]
        plt.bar(entry["x"], sorted(entry["value"], reverse=True))
        save("kl_per_dimension", "latent dimension, largest first", "KL in nats per latent")
    if "prior fit" in sections:
        for name in ("loss by time t", "loss without history by time t"):
            curve("prior fit", name)
        plt.legend()
        save("loss_by_time", "time t, in bins of 0.1", "flow-matching loss")

    # Latents on the two main axes of their distribution, and the ways that some take from noise, given their history.
    posterior = model.vae.encode(idx)
    z0 = model.vae.to_dit(posterior.at(noise_like(posterior.mu, seed)))
    flat = z0.flatten(0, 1)
    center = flat.mean(0)
    axes = torch.linalg.svd(flat - center, full_matrices=False).Vh[:2].T  # (d, 2)
    times, path = torch.linspace(1, 0, 33).tolist(), []

    def velocity(z, t):
        path.append(z[0])
        return velocity_of_all_blocks(model.dit, z0[:1], z, torch.tensor([t], device=z.device))

    path.append(solve(velocity, noise_like(z0[:1], seed + 1), times)[0])
    plt.scatter(*((flat - center) @ axes).T.cpu(), s=2, alpha=0.3, label="encoded latents")
    ways = (torch.stack(path)[:, :: max(z0.shape[1] // 8, 1)] - center) @ axes  # (33, a few, 2)
    for way in ways.unbind(1):
        plt.plot(*way.T.cpu(), linewidth=1)
        plt.plot(*way[-1].cpu(), "k.", markersize=5)
    plt.legend()
    save("latents", "first principal axis", "second principal axis")


# ----------------------------------------------------------------------------------------------------------------------

SECTIONS = ("reconstruction", "compression", "prior", "likelihood")
CONTEXT = 16  # tokens before each held-out sequence that the n-gram judge reads


DIAGNOSTICS_ONLY = ("sections", "num_sequences", "seq_len", "likelihood_sequences", "read_times", "plot")
LIKELIHOOD_ONLY = ("samples", "ode_steps", "exact", "rank_time")  # of the diagnostics and of --rank
BENCHMARKS_ONLY = ("max_new_tokens", "task_data", "rank", "rank_time", "dtype", "compile", "limit", "batch_size")
BENCHMARKS_ONLY += ("protocol", "pad_id", "eos_id")


@dataclass
class Options(TextOptions):  # of which dtype, pad_id and eos_id are for benchmarks
    model: str = option("runs/cola", "folder in the released format")
    out: str = option("", "folder of all results; default runs/evaluation, with --tasks runs/benchmarks")
    # diagnostics
    data: str = option("", "folder of the training and held-out tokens; nothing: those of the model's run")
    sections: tuple = option(SECTIONS, f"which diagnostics: {' '.join(SECTIONS)}")
    num_sequences: int = option(128, "held-out sequences behind each figure", low=4)
    seq_len: int = option(32, "tokens of a sequence", low=1)
    likelihood_sequences: int = option(32, "held-out sequences behind the likelihood, which takes longest", low=2)
    samples: int = option(2, "likelihood: draws from the posterior", low=1)
    ode_steps: int = option(128, "likelihood: steps of the ODE solver", low=1)
    exact: bool = option(False, "likelihood: exact divergence, d * block_size times as long; then IWAE is a bound")
    read_times: tuple = option((0.0, 0.4), "likelihood: when the decoder reads (see `log_weights`)", low=0.0, high=0.99)
    plot: bool = option(False, "write figures as PNG; needs matplotlib")
    # benchmarks
    tasks: str = option("", f"benchmarks: {','.join(benchmarks.TASKS)}, or all; with --score, the task of the files")
    max_new_tokens: int = option(32, "benchmarks: at most so many new tokens; the sampler is the released one", low=1)
    task_data: str = option("benchmarks", "folder of task.jsonl files")
    rank: bool = option(False, "choose the likeliest of the choices instead of generating")
    rank_time: float = option(0.0, "with --rank: when the decoder reads (likelihood.log_weights)", low=0.0, high=0.99)
    protocol: str = option("paper", "benchmarks: paper, or released (benchmarks.py)", choices=("paper", "released"))
    compile: bool = option(False, "benchmarks: compile a step of the solver, as in sample.py")
    limit: int = option(0, "only so many lines of each task; 0: all", low=0)
    batch_size: int = option(32, "prompts at a time", low=1)
    score: tuple = option((), "files of generations to score; no model is needed")


def main():
    o, given = parse_options(Options, __doc__)
    if o.score:
        return benchmarks.score_files(o.score, o.tasks, Path(o.out) if o.out else None)
    o.out = o.out or ("runs/benchmarks" if o.tasks else "runs/evaluation")
    useless = given & set(DIAGNOSTICS_ONLY if o.tasks else BENCHMARKS_ONLY)
    if o.tasks and not o.rank:
        useless |= given & set(LIKELIHOOD_ONLY)
    if useless:
        kind = "the diagnostics or --rank" if o.tasks else "--tasks"
        raise ValueError(f"{flag(min(useless))} is for {kind}: leave it out")
    if unknown := set(o.sections) - set(SECTIONS):
        raise ValueError(f"unknown section {sorted(unknown)[0]}: choose among {' '.join(SECTIONS)}")
    if o.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install matplotlib")
    device = join_processes(pick_device(o.device))
    if o.tasks:
        if o.protocol == "released":
            released = benchmarks.RELEASED | (dict(dtype="autocast") if device.type == "cuda" else {})
            released = {name: value for name, value in released.items() if name not in given}
            o, given = replace(o, **released), given | set(released)
        jobs = benchmarks.open_tasks(o.tasks, o.task_data, o.limit, o.rank)  # the model takes longer to load
    dtype, amp = sampling_precision(o.dtype, device) if o.tasks else (torch.float32, None)
    model = ColaDLM.from_pretrained(o.model, device, dtype, with_tokenizer=True).requires_grad_(False)
    vae, prior = model.vae.config, model.dit.config
    prior.block_size = o.block_size or prior.block_size  # for everything that follows
    if o.tasks:
        if o.compile:
            model = CompiledColaDLM(model)
        with amp:
            return run_tasks(model, jobs, o, given)

    o.data = o.data or own_data(o.model)
    corpus = data.open_tokens(o.data)
    data.check_same(corpus.tokenizer, model.tokenizer)
    data.check_seq_len(o.seq_len, vae.patch_size, vae.block_size, prior.block_size)
    data.check_length(len(corpus.train), len(corpus.val), 1, o.seq_len + CONTEXT)
    rows = data.even_batch(corpus.val, o.num_sequences, o.seq_len + CONTEXT)
    before, idx = rows[:, :CONTEXT].tolist(), rows[:, CONTEXT:].to(device)
    if len(idx) < 4 or idx.shape[1] < 2 * vae.patch_size:
        raise ValueError(f"{len(idx)} sequences of {o.seq_len} tokens: there must be 4 at least, of 2 latents at least")
    if not vae.use_variation and {"compression", "likelihood"} & set(o.sections):
        raise ValueError("this VAE has no variance: it can only be asked for --sections reconstruction prior")
    report = Report(Path(o.out), dict(model=o.model, data=o.data, options=asdict(o)))
    print(f"{o.model} on {idx.numel():,} held-out tokens of {o.data}, {len(idx)} sequences of {o.seq_len}")
    with torch.no_grad():
        if "reconstruction" in o.sections:
            reconstruction(report, model, idx, o.seed)
        if "compression" in o.sections:
            compression(report, model, idx, o.seed)
        if "prior" in o.sections:
            settings = o.settings() | dict(cfg_scale=o.guidance(prior.block_size))
            prior_fit(report, model, idx, before, corpus, settings, o.seed)
        if "likelihood" in o.sections:
            chosen = torch.linspace(0, len(idx) - 1, min(o.likelihood_sequences, len(idx))).long()
            likelihood(report, model, idx[chosen], o)
        if o.plot and rank() == 0:
            plot(report.folder, report.sections, model, idx, o.seed)
    print(f"\n± is the standard error over sequences (jackknife); all figures are in {report.folder}/report.json")


def run_tasks(model, jobs, o, given):
    """The benchmarks, with the released sampler unless the command line says otherwise."""
    released = asdict(RELEASED)
    paper = {name: released[name] for name in ("cfg_scale", "grid", "eta") if name not in given}
    settings, ranking = o.settings() | paper | o.own_ids(model.tokenizer), None
    if o.rank:
        n_samples = o.samples if "samples" in given else 1  # with one, what belongs to the prompt cancels
        ranking = dict(n_samples=n_samples, steps=o.ode_steps, read_time=o.rank_time, exact=o.exact, seed=o.seed)
        ranking |= dict(pad_id=settings["pad_id"])
    weights = [sorted(set(weight_files(Path(o.model) / part).values())) for part in ("cola_vae", "cola_dit")]
    weights = [zlib.crc32(file.open("rb").read(1 << 26)) for files in weights for file in files]  # of the first 64 MB
    about = dict(weights=weights, settings=settings, ranking=ranking, dtype=o.dtype, protocol=o.protocol)
    file, content = Path(o.out) / "settings.json", json.dumps(about, indent=2, allow_nan=False) + "\n"
    with first_process_first():
        if not file.exists():
            check_new(o.out, "choose another --out")
            with replacing(file) as temporary:
                temporary.write_text(content)
        elif file.read_bytes() != content.encode():
            raise ValueError(f"{o.out} holds results of another model or with other options: choose another --out")
    benchmarks.run(model, jobs, Path(o.out), settings, o.batch_size, ranking, one_example=o.protocol == "released")


if __name__ == "__main__":
    run_script(main)
