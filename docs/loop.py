# %% [markdown]
# # The denoising loop, from nothing
#
# This page builds the loop of DiffusionGemma one idea at a time, on a model of 1.5 million parameters that ships with
# the package and solves Sudokus. Every cell runs in well under a second on a CPU. At the end stands the same answer as
# `lm.generate` gives, step by step.
#
# The source is `docs/loop.py`; `python docs/notebook.py` makes `docs/loop.ipynb` of it and runs it.

# %%
import random
from itertools import islice

import matplotlib.pyplot as plt
import torch

import dgemma
from dgemma.evals.tasks import sudoku

lm = dgemma.load("sudoku", device="cpu")
model = lm.model
torch.set_grad_enabled(False)

puzzle = """
016000090
450007200
008006731
069034005
045790000
000502409
001040007
000189300
080670000
""".strip()

# %% [markdown]
# ## Tokens
# The model reads token ids. A cell is a token, and so is the end of a row. The chat template puts a few more around
# them: whose turn it is, and that the model's begins.

# %%
prompt = torch.tensor(lm.tokens(puzzle))
print(len(prompt), "tokens, which read:")
print(lm.tokenizer.decode(prompt.tolist()))

# %% [markdown]
# ## The prompt is read once
# In its first mode the network reads from left to right and leaves keys and values in a cache. Nothing is asked of it
# yet. All that follows reads this cache and never changes it.

# %%
cache = model.new_cache()
model.encode([prompt], cache)
print(cache.lengths, "tokens are in the cache:", cache.nbytes, "bytes")

# %% [markdown]
# ## A canvas of noise
# The answer has a fixed number of places, the canvas. It begins as tokens drawn at random from the whole vocabulary.
# Each draw is fixed by seed, block, step and position, so the same seed gives the same picture on any machine.

# %%
noise = lm.noise(seed=0)
canvas = noise.canvas(0)
C, V = len(canvas), model.config.vocab_size
ROW = 10  # nine cells and the end of the row


def cells(tokens):
    """How each token reads, in one or two characters."""
    return [lm.tokenizer.decode([token]).strip() or "·" for token in tokens.tolist()]


def draw(axes, values, texts=None, title="", low=0.0, high=1.0, colours="viridis"):
    """A canvas as a grid of nine rows: a colour for each place, and its token."""
    axes.imshow(values.view(-1, ROW)[:, :9], cmap=colours, vmin=low, vmax=high)
    for i, text in enumerate(texts or []):
        if i % ROW < 9 and len(text) < 3:
            axes.text(i % ROW, i // ROW, text, ha="center", va="center", color="white", fontsize=8)
    axes.set_title(title, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])


figure, axes = plt.subplots(figsize=(2.6, 2.6))
draw(axes, torch.zeros(C), cells(canvas), "nothing but noise")

# %% [markdown]
# ## One look at it
# In its second mode the same network reads the canvas and the cache. Here every place sees every other, to its left and
# to its right. It says of all places at once how likely each token is there.

# %%
logits = model.denoise(canvas[None], cache)[0]
print(list(logits.shape), "logits: one row for each of", C, "places")

# %% [markdown]
# ## How sure is it?
# Divided by a temperature and put through a softmax, logits are probabilities. Their entropy says how sure the model
# is of a place: 0 if it would bet everything on one token, ln 9 = 2.2 if all nine digits seem alike.


# %%
def look(logits, temperature):
    """Probabilities [C, V] and entropies [C], in nats."""
    p = (logits / temperature).softmax(-1)
    return p, -(p * p.clamp_min(1e-30).log()).sum(-1)


p, entropy = look(logits, temperature=0.8)
best = p.argmax(-1)
figure, axes = plt.subplots(1, 2, figsize=(5.4, 2.8))
draw(axes[0], entropy, title="entropy", high=2.2)
draw(axes[1], entropy, cells(best), "the likeliest tokens", high=2.2)
print(f"mean entropy {entropy.mean():.2f}; the givens are sure, most of the rest is not")

# %% [markdown]
# ## Keep only what is sure
# All places are filled at once, so two unsure places may contradict each other. The rule: sort the places by entropy,
# and keep them as long as the entropies *before* a place sum to at most 0.1 nats. So the first one is always kept.


# %%
def accept(entropy, bound=0.1):
    """bool [C]: the places to keep."""
    ascending, order = entropy.sort()
    before = ascending.cumsum(0) - ascending
    return torch.zeros(len(entropy), dtype=torch.bool).scatter(0, order, before <= bound)


kept = accept(entropy)
ascending = entropy.sort().values
figure, axes = plt.subplots(figsize=(4.5, 2.4))
axes.plot(ascending.cumsum(0) - ascending, label="sum of the entropies before")
axes.axhline(0.1, color="grey", linestyle="--", label="bound")
axes.axvline(int(kept.sum()) - 0.5, color="tab:red", label=f"{int(kept.sum())} places are kept")
axes.set_ylim(0, 0.5)
axes.set_xlabel("places, the surest first")
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## Draw, and throw the rest away
# A kept place gets a token *drawn* from its probabilities: the first one whose running sum exceeds a uniform number.
# Every other place gets fresh noise. Nothing is kept for good: the next step decides anew.


# %%
def drawn(p, uniform):
    """Tokens [C] by inverse CDF."""
    return (p.cumsum(-1) > uniform[:, None]).int().argmax(-1)


proposal = drawn(p, noise.uniform(0, 1))
canvas_1 = torch.where(kept, proposal, noise.renoise(0, 1))
figure, axes = plt.subplots(1, 2, figsize=(5.4, 2.8))
draw(axes[0], torch.zeros(C), cells(canvas), "before")
draw(axes[1], kept.float() * 0.6, cells(canvas_1), "after one step: kept places are light")

# %% [markdown]
# ## Tell it what it thought
# Noise wipes out what the model believed of the places that were not kept. So the next step is also given the logits
# of the last one, divided by their temperature: *self-conditioning*. A first step has none, and that is not the same as
# logits of zero.

# %%
_, without = look(model.denoise(canvas_1[None], cache)[0], 0.79)
_, with_it = look(model.denoise(canvas_1[None], cache, (logits / 0.8)[None])[0], 0.79)
figure, axes = plt.subplots(1, 2, figsize=(5.4, 2.8))
draw(axes[0], without, title=f"second step without it: {without.mean():.2f}", high=2.2)
draw(axes[1], with_it, title=f"with it: {with_it.mean():.2f} nats", high=2.2)

# %% [markdown]
# ## Cooler, step by step
# The temperature falls with the steps that are *left*, from 0.8 towards 0.4, which it never reaches.


# %%
def temperature(left, steps=48, low=0.4, high=0.8):
    return low + (high - low) * left / steps


print([round(temperature(left), 3) for left in (48, 47, 24, 1)])

# %% [markdown]
# ## When to stop
# As soon as the likeliest tokens are the same as a step before *and* the mean entropy is below 0.005. This step itself
# is not part of the history; if it were, the test would always pass.
#
# ## The loop
# That is all of it.


# %%
def denoise(cache, block=0, steps=48, self_conditioning=True):
    """Yields (best, canvas, kept, entropy, temperature) after each step until the canvas is still."""
    canvas, previous, last = noise.canvas(block), None, None
    for step in range(1, steps + 1):
        t = temperature(steps - step + 1, steps)
        logits = model.denoise(canvas[None], cache, previous)[0]
        p, entropy = look(logits, t)
        best, kept = p.argmax(-1), accept(entropy)
        canvas = torch.where(kept, drawn(p, noise.uniform(block, step)), noise.renoise(block, step))
        yield best, canvas, kept, entropy, t
        if last is not None and torch.equal(best, last) and entropy.mean() < 0.005:
            return
        last = best
        previous = (logits / t)[None] if self_conditioning else None


trajectory = list(denoise(cache))
print(len(trajectory), "steps for", C, "places")

# %% [markdown]
# Above what the model believes and how unsure it is of it; below what it keeps, and what the next step sees.

# %%
shown = sorted({round(i * (len(trajectory) - 1) / 4) for i in range(5)})
figure, axes = plt.subplots(2, len(shown), figsize=(11, 4.6))
for column, i in enumerate(shown):
    best, canvas, kept, entropy, t = trajectory[i]
    draw(axes[0, column], entropy, cells(best), f"step {i + 1}: {entropy.mean():.3f} nats", high=2.2)
    draw(axes[1, column], kept.float() * 0.6, cells(canvas), f"{int(kept.sum())} of {C} kept")

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 2.4))
number = range(1, len(trajectory) + 1)
axes[0].semilogy(number, [step[3].mean() for step in trajectory], "o-")
axes[0].axhline(0.005, color="grey", linestyle="--")
axes[0].set_title("mean entropy, nats", fontsize=9)
axes[1].plot(number, [int(step[2].sum()) for step in trajectory], "o-")
axes[1].set_title(f"places kept, of {C}", fontsize=9)
axes[2].plot(number, [step[4] for step in trajectory], "o-")
axes[2].set_title("temperature", fontsize=9)
plt.show()

# %% [markdown]
# ## The answer
# What counts are the likeliest tokens of the last step, never the canvas, which may still hold noise. In a longer text
# they would be encoded behind the prompt, and the next canvas would begin.

# %%
answer = trajectory[-1][0]
*grid, end = answer.tolist()
text = lm.tokenizer.decode(grid)
print(text)
print("and then", lm.tokenizer.decode([end]))
print(lm.task.check(puzzle, text))

# %% [markdown]
# ## The same as the real one
# The package's own loop is a batch of such rows, with pages, kernels and pins. It has to give the same.

# %%
theirs = lm.generate(puzzle, seed=0)
assert theirs.steps == [len(trajectory)]
assert theirs.tokens == answer.tolist()[: len(theirs.tokens)]
print("the same", len(theirs.tokens), "tokens after the same", theirs.steps[0], "steps")

# %% [markdown]
# ## Now break it
# Leave a rule out and see, on sixteen harder puzzles that the model has never seen: 30 to 35 cells are given.

# %%
draws = random.Random(0)
items = (sudoku.draw(draws, "30-35") for _ in iter(int, 1))
puzzles = [item.question[-1]["content"] for item in islice((i for i in items if i.held_out), 16)]


def outcomes(name, **options):
    solved, taken = 0, []
    for puzzle in puzzles:
        cache = model.new_cache()
        model.encode([torch.tensor(lm.tokens(puzzle))], cache)
        run = list(denoise(cache, **options))
        solved += lm.task.check(puzzle, lm.tokenizer.decode(run[-1][0].tolist()[:-1])).right
        taken.append(len(run))
    print(f"{name:26} {solved:2} of {len(puzzles)} solved, {sum(taken) / len(puzzles):4.1f} steps on average")


outcomes("as it is")
outcomes("without self-conditioning", self_conditioning=False)
the_rule, accept = accept, lambda entropy: torch.ones(len(entropy), dtype=torch.bool)
outcomes("everything is kept")
accept = the_rule

# %% [markdown]
# Where to go from here: `docs/structure.md` tells where each of these cells lies in the package, `dgemma eval sudoku`
# measures on hundreds of puzzles that the model has never seen, and `dgemma conformance` says whether a loop of your
# own is right.
