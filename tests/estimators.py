"""Tiny estimators of every class, for tests of what all of them promise."""

from deepmix import (
    AECM,
    DCAN,
    AutoencoderDeepDPM,
    ClusteringModule,
    DeepDPM,
    NeuralMixtureEM,
)

# tol=0: train for max_iter epochs, and do not warn that they were few.
SMALL = {
    ClusteringModule: {"n_init": 2, "max_iter": 20, "tol": 0},
    AECM: {
        "hidden_layer_sizes": (16,),
        "latent_dim": 5,
        "pretrain_max_iter": 15,
        "clustering_max_iter": 2,
        "max_iter": 15,
        "learning_rate_init": 5e-3,
        "tol": 0,
    },
    DCAN: {
        "hidden_layer_sizes": (16,),
        "batch_size": 40,
        "pretrain_max_iter": 20,
        "max_iter": 15,
        "learning_rate_init": 5e-3,
        "readout_n_init": 2,
        # Longer than this fit; what the loss is should not hang on the epoch.
        "warm_up": 0,
    },
    NeuralMixtureEM: {"n_init": 2, "max_iter": 30, "learning_rate_init": 1e-2},
    # Nets soft enough after 60 epochs of 12 steps for responsibilities to hang on every digit.
    DeepDPM: {"n_init": 1, "max_iter": 60, "split_merge_every": 60, "freeze": 20, "tol": 0},
    AutoencoderDeepDPM: {
        "hidden_layer_sizes": (16,),
        "latent_dim": 3,
        "pretrain_max_iter": 15,
        "clusterer": DeepDPM(amortized=False, prior_scale="codes", max_iter=20, tol=0),
        "n_alternations": 1,
        "max_iter": 15,
        "learning_rate_init": 5e-3,
    },
}


def number(cls):
    """The class's own name of the number of clusters."""
    names = ("n_clusters", "n_clusters_init", "clusterer__n_clusters_init")
    own = cls().get_params(deep=False)
    return next(name for name in names if name.split("__")[0] in own)


def with_parameters(model, **parameters):
    """The estimator with these parameters; those it does not have are its clusterer's."""
    own = model.get_params(deep=False)
    named = {n if n.split("__")[0] in own else f"clusterer__{n}": parameters[n] for n in parameters}
    return model.set_params(**named)
