"""Every key of a configuration, with a comment; other configs call this one and override.

A section's keys are the names of the arguments of what it builds. Letters are the paper's (arXiv
2511.16904): alpha is the blur level (standard deviation in pixels), beta the noise level, BNR =
alpha / beta. "EDM" is Karras et al. 2022 (arXiv 2206.00364).
"""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
    """A small network on scikit-learn's digits, with the paper's process and EDM's recipe."""
    config = ml_collections.ConfigDict()
    config.seed = 0  # of weights, noise and the order of images
    # Initial weights of a new run, of the same network at any resolution: a model folder, a
    # training workdir or its checkpoints/STEP, or a file of EDM's weights; empty: random ones.
    config.init_from = ""
    # Fetch public files that are missing (warm_diffusion/public.py): --download.
    config.download = False
    # Where compiled programs are kept for the next start; empty turns that off. The environment
    # variable JAX_COMPILATION_CACHE_DIR takes precedence.
    config.compilation_cache_dir = "~/.cache/warm_diffusion/compiled"

    config.data = data = ml_collections.ConfigDict()
    # digits | photos | cifar10[:SPLIT] | folder:DIR | zip:FILE | tar:FILE | npy:FILE | npz:FILE |
    # parquet:FILE | tfds:NAME[:SPLIT]; FILE may be on gs://; several joined by +, such as
    # photos+folder:DIR
    data.source = "digits"
    data.resolution = 0  # crop and resize to this height and width; 0: the images' own size
    data.channels = 0  # 1 (grey) or 3 (RGB) converts; 0: the images' own
    data.resize = "lanczos"  # lanczos | box (area average)
    data.too_small = "refuse"  # images smaller than resolution: refuse | skip | enlarge
    # Cut every image into as many tiles of this resolution as fit, at its own scale, instead.
    data.tiles = False
    data.cache_dir = ""  # prepared images; empty: the user's cache folder
    data.data_dir = ""  # where cifar10's files, or TensorFlow Datasets' prepared sets, are

    config.model = model = ml_collections.ConfigDict()
    model.name = "ddpmpp"  # ddpmpp | ncsnpp
    model.model_channels = 24  # base width
    model.channel_mult = (1, 2)  # width of each level, fine to coarse, in multiples of it
    model.num_blocks = 1  # residual blocks per level
    model.attention_resolutions = (4,)  # heights at which blocks attend
    model.dropout = 0.0  # EDM: 0.13 on CIFAR-10, 0.05 on FFHQ
    model.num_classes = 0  # class labels given to the network, as many as the data have; 0: none
    model.label_dropout = 0.0  # share of training without the class, for guidance (0.1 is usual)
    model.remat = False  # recompute blocks for their gradient: less memory, a third more work
    model.dtype = "float32"  # of the convolutions: float32 | bfloat16; the rest stays float32

    config.denoiser = denoiser = ml_collections.ConfigDict()
    # What the network's output means: divide (two heads) | clean | score
    denoiser.parameterization = "divide"
    denoiser.sigma_data = 0.5  # standard deviation of the data in [-1, 1]

    config.augment = augment = ml_collections.ConfigDict()
    # x_flip, y_flip, scale, rotate, anisotropy, translate, or none; the network gets them as input.
    augment.transforms = ()
    augment.probability = 0.12  # of each but x_flip, which half of the images have; EDM, CIFAR-10

    # One sub-section for each path: the arguments of its constructor in schedules.py. Those of the
    # paths that are not chosen do nothing.
    config.schedule = schedule = ml_collections.ConfigDict()
    # hot | constant_bnr | any_bnr | spectral | blurring_diffusion | cold
    schedule.name = "constant_bnr"
    levels = {
        "beta_min": 0.002,  # smallest noise level sampled
        "beta_max": 80.0,  # noise level at which sampling starts
        "p_mean": -1.2,  # ln beta in training ~ N(p_mean, p_std^2)
        "p_std": 1.2,  # see p_mean
    }
    schedule.hot = ml_collections.ConfigDict(levels)  # BNR 0: EDM
    schedule.constant_bnr = constant_bnr = ml_collections.ConfigDict(levels)  # the paper
    # Pixels of blur per unit of noise, the paper's best; or "auto": from the data's spectrum (the
    # number goes into the run's config.json).
    constant_bnr.bnr = config_dict.FieldReference(0.5, field_type=object)
    schedule.any_bnr = any_bnr = ml_collections.ConfigDict(levels)  # one network for all ratios
    any_bnr.bnr = 0.5  # ratio of the path that it samples along
    any_bnr.bnr_range = (0.1, 10.0)  # ln BNR in training is uniform between these
    any_bnr.hot_share = 0.1  # share of training at BNR 0
    # As much blur at each noise level as the data's spectrum allows there.
    schedule.spectral = spectral = ml_collections.ConfigDict(levels)
    # Share of a band that blur takes before noise does; also for bnr=auto and --mode=analyze.
    spectral.attenuation = 0.05
    # t in [0, 1]; sample it with sampling.rho=1
    schedule.blurring_diffusion = blurring_diffusion = ml_collections.ConfigDict()
    blurring_diffusion.sigma_blur_max = 20.0  # blur at t = 1, in pixels (CIFAR-10: 20)
    schedule.cold = cold = ml_collections.ConfigDict()  # blur, little noise
    cold.alpha_min = 0.5  # smallest blur, in pixels
    cold.alpha_max = 24.0  # blur at which sampling starts (CIFAR-10: 24, MNIST: 20)
    cold.beta = 0.01  # the constant noise level

    config.loss = loss = ml_collections.ConfigDict()
    # Weight of the residual head. Parameterization score has no residual to learn: it trains the
    # denoising term alone.
    loss.residual_weight = 1.0

    config.optimizer = optimizer = ml_collections.ConfigDict()  # Adam
    optimizer.learning_rate = 2e-3  # EDM: 1e-3 on CIFAR-10
    optimizer.warmup_images = 20_000  # linear warm-up of the rate; EDM: 10 million
    optimizer.b1 = 0.9  # decay of Adam's mean of gradients
    optimizer.b2 = 0.999  # decay of its mean of squared gradients
    optimizer.eps = 1e-8  # added to the root of the latter
    optimizer.grad_clip = 0.0  # largest norm of the gradient; 0: not clipped, as EDM

    config.training = training = ml_collections.ConfigDict()
    training.num_steps = 1_500  # steps in all; raising it later continues the run
    training.batch_size = 128  # global: over all devices and processes
    training.device_megabytes = 1024  # data sets up to this size live on the devices
    training.sharding = "replicated"  # state: on every device; or fsdp: split over the devices
    training.grad_accumulation = 1  # slices of a batch, one after the other: less memory
    # Steps that one call of the devices takes, for networks so small that calls cost time; divides
    # num_steps, log_every, sample_every and checkpoint_every.
    training.steps_per_call = 1
    training.ema_halflife_images = (20_000,)  # one set of averaged weights for each; EDM: 500,000
    training.ema_rampup = 0.05  # half-life at most this share of the images seen; 0: no ramp-up
    # Where numbers and grids go besides metrics.jsonl: tensorboard, wandb (a project warm_diffusion
    # at Weights & Biases; WANDB_MODE=offline keeps all here); (): nowhere else.
    training.writers = ("tensorboard",)
    training.log_every = 100  # steps between reports
    training.sample_every = 500  # steps between sample grids; 0: none
    training.checkpoint_every = 500  # steps between checkpoints; the last step always has one
    training.keep_latest = 2  # checkpoints kept
    training.keep_every = 0  # also keep those at multiples of this many steps; 0: none
    training.max_nonfinite_steps = 10  # stop after this many non-finite gradients in a row
    # First and last step, such as 20,25, of which a profile is written for TensorBoard; (): none.
    training.profile_steps = ()

    config.sampling = sampling = ml_collections.ConfigDict()
    sampling.solver = "heun"  # euler | heun | multistep
    sampling.num_steps = 18  # network calls: heun 2 n - 1, the others n
    # Times: edm (EDM's formula, sampling starts from noise) | spectral (from the training data's
    # spectrum, it starts from Gaussian data: for few calls, on a path whose noise falls)
    sampling.time_grid = "edm"
    sampling.rho = 7.0  # edm: spacing of the time grid
    sampling.bnr = -1.0  # ratio of the path sampled along; negative: the schedule trained on
    sampling.ema = 0  # which of training.ema_halflife_images; -1: the raw weights
    sampling.guidance = 1.0  # weight of the class (model.label_dropout); 1: not guided
    sampling.label = -1  # class to draw; -1: seed modulo number of classes
    sampling.batch_size = 256  # images at once on each device
    sampling.churn = churn = ml_collections.ConfigDict()  # EDM's stochasticity (heun, euler)
    churn.s_churn = 0.0  # how much; 0: deterministic
    churn.s_min = 0.0  # smallest noise level at which it acts
    churn.s_max = 1e6  # largest
    churn.s_noise = 1.0  # scale of the added noise

    config.eval = evaluation = ml_collections.ConfigDict()
    evaluation.checkpoint = "latest"  # latest | every | best (of eval's reports so far) | a step
    evaluation.num_samples = 0  # images per round; 0: as many as the reference has
    evaluation.repeats = 3  # rounds: seeds 0 to n - 1, n to 2 n - 1, ...; papers give the best
    # pixels (images of up to 4,096 values) | inception (FID) | efficientnet_lite0 (perceptual, from
    # pip) | MODULE:FUNCTION, a function of yours from uint8 images [B, H, W, C] to features [B, D];
    # auto: inception where its weights are given, else pixels of grey images and efficientnet_lite0
    # of colour images
    evaluation.features = "auto"
    evaluation.inception_weights = ""  # file of Inception's weights; empty: fetched by --download
    # Statistics that --mode=fid_stats wrote, or EDM's own .npz (mu, sigma); empty: made from data.
    evaluation.reference = ""
    evaluation.split = ""  # what data's images are, in metric names; empty: the source's, or train
    evaluation.likelihood = False  # bits per dimension of data's images as well (slow)
    evaluation.likelihood_images = 256  # how many, drawn at random; 0: all
    evaluation.likelihood_trace = "hutchinson"  # of the flow: hutchinson | exact (small images)

    config.analysis = analysis = ml_collections.ConfigDict()  # --mode=analyze with --checkpoint
    analysis.num_images = 512  # drawn and compared, in whole batches
    # Source of images that were not trained on, such as folder:cifar10/test, prepared as data's;
    # empty: training images, as many as twice the above.
    analysis.held_out = ""

    config.export = export = ml_collections.ConfigDict()  # --mode=export
    export.num_images = 64  # in the model card's picture; 0: none
    export.evaluation = ""  # workdir of --mode=eval whose reports the card shows; empty: the run's
    # Write the sampler with its weights as one program, sampler.stablehlo: a script with JAX alone
    # draws the same images from it.
    export.program = False
    return config.lock()
