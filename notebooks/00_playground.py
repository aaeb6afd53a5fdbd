# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 00 · Playground
# What does a direction do, in words? Type what a person says; the model answers as it is and under an intervention, side by side.
#
# Each token is coloured by the projection of its residual on the direction (orange along it, blue against it). Below stand
# the log-perplexity ratio of the two replies, against the band in which an effect counts, and the vocabulary that the
# direction raises and lowers. Run all cells, then use the panel.
#
# **Reads** `causality/directions` and the model (a random direction only, where the study has not been run). **Writes** nothing.

# %%
from IPython.display import display

from lib.model.playground import Panel

# %% tags=["parameters"]
studies: list = ["smollm2-135m", "gemma3-270m", "smollm2-135m-random"]  # models to pick from: files in params/
seed: int = 0  # seed of the random direction

# %%
panel = Panel(studies, seed=seed)
print("directions:", *panel.directions)

# %%
display(panel.widget)
