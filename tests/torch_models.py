"""Tiny torch models of every kind that `leangen export module:factory` takes, by name.

Each factory returns what a user's would. Weights are disturbed, so that nothing is at its initial
identity. The libraries are imported inside: a test is skipped where one is not installed.
"""

import torch
from torch import nn

D = 6
HIDDEN = 32
ROWS = 64


def disturbed(module, amount=0.1):
    """The module with noise added to its parameters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(amount * noise.to(parameter.dtype))
    return module.eval()


def rows():
    return torch.randn(ROWS, D, generator=torch.Generator().manual_seed(2))


def images(*shape):
    return torch.rand(ROWS, *shape, generator=torch.Generator().manual_seed(2))


def _zuko(name, **options):
    import zuko

    options = {"transforms": 2, "hidden_features": (HIDDEN, HIDDEN)} | options
    return disturbed(getattr(zuko.flows, name)(D, **options)), rows()


def zuko_maf():
    return _zuko("MAF")


def zuko_maf_residual():
    return _zuko("MAF", residual=True, randperm=True, activation=nn.Tanh)


def zuko_coupling():
    return _zuko("RealNVP", transforms=3)


def zuko_nsf():
    return _zuko("NSF", bins=5)


def zuko_iaf():
    """A MAF the other way round: one pass draws a sample, scoring is sequential."""
    import zuko

    maf = zuko.flows.MAF(D, transforms=2, hidden_features=(HIDDEN, HIDDEN))
    inverted = [transform.inv for transform in maf.transform.transforms]
    return disturbed(zuko.flows.Flow(inverted, maf.base)), rows()


def _nflows(*layers, disturb=0.1):
    from nflows import distributions, flows, transforms

    transform = transforms.CompositeTransform(list(layers))
    flow = flows.Flow(transform, distributions.StandardNormal([D]))
    return disturbed(flow, disturb), rows()


def _residual_net(inputs, outputs):
    from nflows.nn.nets import ResidualNet

    return ResidualNet(inputs, outputs, hidden_features=HIDDEN)


MASK = torch.arange(D) % 2


def nflows_realnvp():
    from nflows import transforms as t

    one, two = (t.AffineCouplingTransform(mask, _residual_net) for mask in (MASK, 1 - MASK))
    return _nflows(one, t.LULinear(D), t.RandomPermutation(D), two)


def nflows_nsf():
    from nflows import transforms as t

    spline = t.PiecewiseRationalQuadraticCouplingTransform(
        MASK, _residual_net, 5, "linear", 2.0, apply_unconditional_transform=True
    )
    return _nflows(spline, t.LULinear(D))


def nflows_maf():
    from nflows import transforms as t

    one = t.MaskedAffineAutoregressiveTransform(D, HIDDEN)
    two = t.MaskedAffineAutoregressiveTransform(
        D, HIDDEN, use_residual_blocks=False, random_mask=True, use_batch_norm=True
    )
    return _nflows(one, t.ReversePermutation(D), two)


def nflows_iaf():
    from nflows import transforms as t

    return _nflows(t.InverseTransform(t.MaskedAffineAutoregressiveTransform(D, HIDDEN)))


def nflows_sequential_nsf():
    from nflows import transforms as t

    return _nflows(
        t.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
            D, HIDDEN, num_bins=5, tails="linear", tail_bound=2.0
        )
    )


def _normflows(*layers):
    import normflows as nf

    return disturbed(nf.NormalizingFlow(nf.distributions.DiagGaussian(D), list(layers))), rows()


def normflows_realnvp():
    import normflows as nf

    layers = []
    for _ in range(2):
        net = nf.nets.MLP([D // 2, HIDDEN, HIDDEN, D])
        layers += [nf.flows.AffineCouplingBlock(net), nf.flows.Permute(D, mode="swap")]
    flow, data = _normflows(*layers, nf.flows.ActNorm(D))
    flow.log_prob(data)  # lets ActNorm initialize itself
    return flow, data


def normflows_nsf():
    import normflows as nf

    spline = nf.flows.CoupledRationalQuadraticSpline(D, 1, HIDDEN, num_bins=5, tail_bound=2.0)
    return _normflows(spline, nf.flows.LULinearPermute(D))


def normflows_maf():
    import normflows as nf

    one, two = (nf.flows.MaskedAffineAutoregressive(D, HIDDEN) for _ in range(2))
    return _normflows(one, nf.flows.InvertibleAffine(D), two)


def normflows_glow():
    """Two levels with squeezes, splits and invertible 1x1 convolutions, on images of 8 x 8."""
    import normflows as nf

    bases, flows, merges = [], [], []
    for level, (channels, side) in enumerate(((8, 2), (4, 4))):
        width = 8 if level == 0 else 4
        blocks = [nf.flows.GlowBlock(width, HIDDEN, split_mode="channel") for _ in range(2)]
        flows.append([*blocks, nf.flows.Squeeze()])
        shape = (channels, side, side) if level == 0 else (2, 4, 4)
        bases.append(nf.distributions.DiagGaussian(shape))
        if level:
            merges.append(nf.flows.Merge())
    flow = nf.MultiscaleFlow(bases, flows, merges, class_cond=False)
    data = images(1, 8, 8)
    flow.log_prob(data, None)
    return {"module": disturbed(flow, 0.02), "example": data}


def normflows_checkerboard():
    import normflows as nf

    net = nf.nets.ConvNet2d([2, HIDDEN, HIDDEN, 4], [3, 1, 3], init_zeros=False)
    block = nf.flows.AffineCouplingBlock(net, split_mode="checkerboard")
    base = nf.distributions.DiagGaussian((2, 4, 4))
    flow = nf.NormalizingFlow(base, [block, nf.flows.Invertible1x1Conv(2)])
    return disturbed(flow), images(2, 4, 4)


class Coupling(nn.Module):
    """A flow of no library: one affine coupling, then a rotation."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(D // 2, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh()
        )
        self.last = nn.Linear(HIDDEN, D)
        self.turn = nn.Parameter(torch.randn(D, D))

    def forward(self, x):
        kept, moved = x.chunk(2, 1)
        log_scale, shift = self.last(self.net(kept)).chunk(2, 1)
        y = torch.cat([kept, moved * torch.exp(log_scale) + shift], 1)
        log_det = log_scale.sum(1) + torch.linalg.slogdet(self.turn)[1]
        return y @ self.turn, log_det

    def inverse(self, z):
        kept, moved = (z @ torch.linalg.inv(self.turn)).chunk(2, 1)
        log_scale, shift = self.last(self.net(kept)).chunk(2, 1)
        return torch.cat([kept, (moved - shift) * torch.exp(-log_scale)], 1)


def plain_coupling():
    return Coupling(), rows()


class Squashed(nn.Module):
    """A module of one's own around a library's layers."""

    def __init__(self):
        super().__init__()
        import zuko

        maf = zuko.flows.MAF(D, transforms=2, hidden_features=(HIDDEN,))
        self.layers = nn.ModuleList(maf.transform.transforms)

    def forward(self, x):
        total = 0.0
        for layer in self.layers:
            x, log_det = layer(None).call_and_ladj(x)
            total = total + log_det
        return torch.asinh(x), total - 0.5 * torch.log1p(x * x).sum(1)

    def inverse(self, z):
        z = torch.sinh(z)
        for layer in reversed(self.layers):
            z = layer(None).inv(z)
        return z


def zuko_layers_in_a_module():
    return disturbed(Squashed()), rows()


FLOWS = {
    f.__name__: f
    for f in (
        *(zuko_maf, zuko_maf_residual, zuko_coupling, zuko_nsf, zuko_iaf),
        *(nflows_realnvp, nflows_nsf, nflows_maf, nflows_iaf, nflows_sequential_nsf),
        *(normflows_realnvp, normflows_nsf, normflows_maf, normflows_glow),
        *(normflows_checkerboard, plain_coupling, zuko_layers_in_a_module),
    )
}
QUANTIZED = ("zuko_maf", "nflows_nsf", "normflows_maf", "normflows_glow", "plain_coupling")
"""One flow of each library and kind of graph; quantizing all takes long."""


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        n, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, 3, c, h * w).transpose(2, 3).unbind(1)
        seen = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(seen.transpose(1, 2).reshape(n, c, h, w))


class Generator(nn.Module):
    """Conditional: a class label beside the latent."""

    def __init__(self):
        super().__init__()
        self.label, self.dense = nn.Embedding(10, 16), nn.Linear(32, 64 * 4)
        self.net = nn.Sequential(
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.ConvTranspose2d(16, 16, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(16, 3, 3, padding=1),
            nn.Tanh(),
        )

    def forward(self, z, label):
        start = self.dense(torch.cat([z, self.label(label)], 1)).view(-1, 16, 4, 4)
        return self.net(start)


def gan_generator():
    return {
        "module": Generator(),
        "example": (torch.randn(2, 16), torch.tensor([1, 3])),
        "conditions": {"label": {"max": 9}},
        "range": [-1, 1],
    }


def vae_decoder():
    return nn.Sequential(
        nn.Conv2d(4, 32, 3, padding=1),
        nn.GELU(),
        Attention(32),
        nn.PixelShuffle(2),
        nn.Conv2d(8, 3, 3, padding=1),
    ), torch.randn(1, 4, 8, 8)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, 1), nn.SiLU(), Attention(32), nn.Conv2d(32, 8, 3, 2, 1)
        )

    def forward(self, image):
        return self.net(image).chunk(2, 1)  # mean and log-variance


def vae_encoder():
    example = torch.rand(1, 3, 16, 16)
    return {"module": Encoder(), "example": example, "kind": "encoder", "range": [-1, 1]}


class Velocity(nn.Module):
    def __init__(self):
        super().__init__()
        self.time = nn.Linear(1, 32)
        self.first, self.last = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 1, 3, padding=1)
        self.middle = nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x, t):
        hidden = torch.relu(self.first(x) + self.time(t[:, None])[:, :, None, None])
        return self.last(nn.functional.silu(self.middle(hidden)))


def flow_matching():
    example = (torch.randn(2, 1, 8, 8), torch.rand(2))
    return {"module": Velocity(), "example": example, "kind": "velocity", "noise_at": 0, "steps": 4}


ONE_SHOT = {f.__name__: f for f in (gan_generator, vae_decoder, vae_encoder, flow_matching)}


class Spectrum(nn.Module):
    def forward(self, z):
        return torch.fft.fft2(z).real


def fourier():
    return Spectrum(), torch.randn(1, 1, 8, 8)


class Branching(nn.Module):
    def forward(self, z):
        return z * 2 if z.sum() > 0 else z


def branching():
    return Branching(), torch.randn(1, 1, 8, 8)


class Noisy(nn.Module):
    def forward(self, z):
        return z + torch.randn_like(z)


def noisy():
    return Noisy(), torch.randn(1, 1, 8, 8)


def nonsense():
    return 3


def failing():
    raise ValueError("no such file of mine")
