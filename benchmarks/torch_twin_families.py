"""The families of genjax as PyTorch modules, for `torch_twins.py`: what is random in a step, and
the loss of each player.
"""

import abc
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch_dcgan
import torch_twin_nets as nets
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]

Noise = dict[str, torch.Tensor]
softplus = functional.softplus


class Twin(nn.Module, abc.ABC):
    """One family: networks, what is random in a step, and the mean loss of each player.

    `images` names the layers between an image and a vector, which order it differently (NHWC there,
    NCHW here), and `mirrored` says that strided convolutions begin at the other edge: all images
    and kernels are then each other's mirror.
    """

    players: tuple[str, ...] = ()
    images: dict[str, tuple[int, ...]] = {}  # noqa: RUF012
    mirrored = False
    redundant = 0  # parameters that PyTorch's layers have and that are held at 0

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__()
        self.s, self.spec, self.n = (
            SimpleNamespace(**case["model"]),
            SimpleNamespace(**case["spec"]),
            case["batch_size"],
        )
        self.top = (self.spec.levels or 2) - 1

    def own(self, player: str) -> nn.Module:
        return self

    def draw(self, player: str) -> Noise:
        return {}

    @abc.abstractmethod
    def loss(
        self, player: str, x: torch.Tensor, cond: torch.Tensor | None, noise: Noise
    ) -> torch.Tensor:
        """The mean over the batch, as genjax's loss of that player."""

    def settle(self) -> None:
        """After the gradient: keep what the next step begins with."""

    def named(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """genjax's parameters by the names that they have here."""
        return arrays

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.spec.kind == "continuous" else x * (2 / self.top) - 1


class VAE(Twin):
    players = ("vae",)

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__(case)
        s, shape = self.s, self.spec.shape
        if s.net == "conv":
            self.encoder = nets.ConvEncoder(shape, s.channels, 2 * s.latent_dim)
            self.decoder = nets.ConvDecoder(s.latent_dim, shape, s.channels[::-1])
            self.images, self.mirrored = (
                {"encoder.last": self.decoder.start, "decoder.first": self.decoder.start},
                True,
            )
        else:
            self.encoder = nets.MLP(math.prod(shape), s.hidden, 2 * s.latent_dim)
            self.decoder = nets.MLP(s.latent_dim, s.hidden[::-1], math.prod(shape))
        self.log_scale = nn.Parameter(torch.zeros(()))

    def draw(self, player: str) -> Noise:
        return {"z": torch.randn(self.n, self.s.latent_dim)}

    def loss(
        self, player: str, x: torch.Tensor, cond: torch.Tensor | None, noise: Noise
    ) -> torch.Tensor:
        y = self.normalize(x)
        mean, raw = self.encoder(y if self.s.net == "conv" else y.flatten(1)).chunk(2, 1)
        log_scale = raw + (raw.clamp(min=-15.0) - raw).detach()
        location = self.decoder(torch.addcmul(mean, torch.exp(log_scale), noise["z"])).view_as(x)
        log_s = softplus(self.log_scale + 7) - 7
        width, inverse = 2 / self.top, torch.exp(-log_s)
        upper = (y - location + width / 2) * inverse
        lower = upper - width * inverse
        above, below = functional.logsigmoid(upper), functional.logsigmoid(-lower)
        nats = above + below + torch.log(-torch.expm1(-width * inverse))
        nats = torch.where(x < 0.5, above, torch.where(x > self.top - 0.5, below, nats))
        kl = 0.5 * (torch.exp(2 * log_scale) + mean.square() - 1) - log_scale
        return (kl.sum() - nats.sum()) / self.n


class GAN(Twin):
    players = ("discriminator", "generator")

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__(case)
        s, shape = self.s, self.spec.shape
        self.penalised = (s.r1 > 0, s.r2 > 0)
        if s.net == "dcgan":
            self.generator = torch_dcgan.Generator(s.latent_dim, tuple(s.channels), shape[0])
            self.discriminator = torch_dcgan.Discriminator(tuple(s.channels), shape[0])
            torch_dcgan.initialise(self)
            self.images = {
                "generator.first": self.generator.start,
                "discriminator.logit": self.generator.start,
            }
        else:
            self.generator = nets.MLPGenerator(
                s.latent_dim, shape, s.hidden[::-1], self.spec.kind != "continuous"
            )
            self.discriminator = nets.Discriminator(
                shape, s.hidden, bias=s.objective != "relativistic"
            )

    def own(self, player: str) -> nn.Module:
        return getattr(self, player)

    def draw(self, player: str) -> Noise:
        return {"z": torch.randn(self.n, self.s.latent_dim)}

    def judged(self, x: torch.Tensor, penalised: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits [n], and ∇D(x) where it is penalised."""
        if not penalised:
            return self.discriminator(x), None
        if (
            torch.compiler.is_compiling()
        ):  # which differentiates twice only in this form; in eager mode it is the slower one

            def total(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                logits = self.discriminator(x)
                return logits.sum(), logits

            gradient, logits = torch.func.grad(total, has_aux=True)(x)
            return logits, gradient
        x = x.detach().requires_grad_()
        logits = self.discriminator(x)
        return logits, torch.autograd.grad(logits.sum(), x, create_graph=True)[0]

    def loss(
        self, player: str, x: torch.Tensor, cond: torch.Tensor | None, noise: Noise
    ) -> torch.Tensor:
        real, pairs = self.normalize(x), self.s.objective == "relativistic"
        if self.s.net == "mlp":
            real = real.flatten(1)
        if player == "generator":
            logits = self.discriminator(self.generator(noise["z"]))
            if not pairs:
                return softplus(-logits).mean()
            with torch.no_grad():
                on_real = self.discriminator(real)
            return softplus(on_real - logits).mean()
        with torch.no_grad():
            fake = self.generator(noise["z"])
        on_real, gradient_real = self.judged(real, self.penalised[0])
        on_fake, gradient_fake = self.judged(fake, self.penalised[1])
        value = (
            softplus(on_fake - on_real).mean()
            if pairs
            else softplus(-on_real).mean() + softplus(on_fake).mean()
        )
        for weight, gradient in ((self.s.r1, gradient_real), (self.s.r2, gradient_fake)):
            value = (
                value
                if gradient is None
                else value + 0.5 * weight / self.n * gradient.square().sum()
            )
        return value


class RNN(Twin):
    players = ("rnn",)

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__(case)
        s = self.s
        self.embed = nets.Events(self.spec.levels, s.d_embed)
        make: Any = {"vanilla": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}[s.cell]
        self.layers = make(s.d_embed, s.d_hidden)
        self.readout = nn.Linear(s.d_hidden, self.spec.levels)
        # PyTorch has a second bias of every gate, which does the same as the first but for the last
        # gate of a GRU.
        bias = self.layers.bias_hh_l0
        self.redundant = (2 if s.cell == "gru" else len(bias) // s.d_hidden) * s.d_hidden
        with torch.no_grad():
            bias.zero_()
        if s.cell == "gru":
            kept = torch.arange(len(bias)) >= self.redundant
            bias.register_hook(lambda gradient: gradient * kept)
        else:
            bias.requires_grad_(False)
        carried = 2 if s.cell == "lstm" else 1
        self.register_buffer("carry", torch.zeros(carried, 1, self.n, s.d_hidden))
        self.register_buffer("last", torch.zeros(self.n, dtype=torch.long))
        self.register_buffer("started", torch.zeros(self.n, dtype=torch.bool))

    def draw(self, player: str) -> Noise:
        return {"restart": torch.rand(self.n) < self.s.restart}

    def loss(
        self, player: str, x: torch.Tensor, cond: torch.Tensor | None, noise: Noise
    ) -> torch.Tensor:
        x, on = x.t(), self.started & ~noise["restart"]  # time first
        events = self.embed.table(torch.cat([self.last[None], x[:-1]]))
        first = torch.where(on[:, None], events[0], self.embed.start)
        carry = self.carry * on[:, None]
        h, after = self.layers(
            torch.cat([first[None], events[1:]]),
            (carry[0], carry[1]) if self.s.cell == "lstm" else carry[0],
        )
        self.after = [part.detach() for part in (after if self.s.cell == "lstm" else (after,))] + [
            x[-1]
        ]
        logits = self.readout(h)
        return (
            functional.cross_entropy(logits.flatten(0, 1), x.reshape(-1), reduction="sum") / self.n
        )

    def settle(self) -> None:
        for part, after in zip((*self.carry, self.last), self.after, strict=True):
            part.copy_(after)
        self.started.fill_(True)

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        """What PyTorch's recurrent layers call otherwise."""
        at, kernel = self.layers, arrays["layers/layers/0/kernel"]
        own = arrays.get("layers/layers/0/bias", np.zeros(0, np.float32))
        values = {
            at.weight_ih_l0: arrays["layers/layers/0/inputs/kernel"].T,
            at.weight_hh_l0: kernel.T,
            at.bias_ih_l0: arrays["layers/layers/0/inputs/bias"],
            at.bias_hh_l0: np.concatenate([np.zeros(kernel.shape[1] - len(own), np.float32), own]),
        }
        for parameter, value in values.items():
            parameter.data.copy_(torch.from_numpy(np.array(value)))


class Blocks(Twin):
    """A stack of blocks over tokens, from a start to the last but one."""

    def loss(
        self, player: str, x: torch.Tensor, cond: torch.Tensor | None, noise: Noise
    ) -> torch.Tensor:
        events = self.inputs["events"]
        h = torch.cat([events.start.expand(self.n, 1, -1), events.table(x[:, :-1])], 1)
        for block in self.blocks:
            h = block(h)
        logits = self.readout["dense"](self.readout["norm"](h))
        return functional.cross_entropy(logits.flatten(0, 1), x.flatten(), reduction="sum") / self.n


class Transformer(Blocks):
    players = ("transformer",)

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__(case)
        s, context = self.s, self.spec.shape[0]
        self.inputs = nn.ModuleDict({"events": nets.Events(self.spec.levels, s.d_model)})
        self.blocks = nn.ModuleList(
            [nets.Block(s.d_model, s.n_heads, context, s.bias) for _ in range(s.n_layers)]
        )
        norm, dense = nn.LayerNorm(s.d_model, bias=s.bias), nn.Linear(s.d_model, self.spec.levels)
        self.readout = nn.ModuleDict({"norm": norm, "dense": dense})
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(
                    p,
                    0.0,
                    0.02 / (2 * s.n_layers) ** 0.5 if "out" in name or "down" in name else 0.02,
                )


class VRNN(Twin):
    players = ("vrnn",)

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__(case)
        (width,), d, z, size = self.s.hidden, self.s.d_hidden, self.s.latent_dim, self.spec.shape[1]
        self.embed = nn.ModuleDict(
            {"dense": nn.Linear(size, width), "condition": nn.Embedding(self.spec.n_classes, width)}
        )
        self.embed.register_parameter("start", nn.Parameter(0.02 * torch.randn(width)))
        self.layer = nets.GatedCell(width, d)
        self.z_features = nets.MLP(z, [], width)
        self.z_inputs = nn.Linear(width, 3 * d, bias=False)
        self.prior = nets.MLP(d, [width], 2 * z, functional.relu)
        self.encoder = nets.JointMLP(width, d, width, 2 * z)
        self.decoder = nets.JointMLP(width, d, width, size * self.spec.levels)

    def draw(self, player: str) -> Noise:
        return {"z": torch.randn(self.spec.shape[0], self.n, self.s.latent_dim)}

    def normal(self, outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, raw = outputs.chunk(2, -1)
        return mean, torch.log(softplus(raw) + 1e-3)

    def loss(
        self, player: str, x: torch.Tensor, cond: torch.Tensor | None, noise: Noise
    ) -> torch.Tensor:
        given, relu = self.embed["condition"](cond), functional.relu
        x = x.transpose(0, 1)
        features = relu(self.embed["dense"](self.normalize(x)) + given)
        first, a = self.encoder.first(features), self.layer.inputs(features)
        h = self.layer(
            self.layer.inputs(relu(self.embed.start + given)), torch.zeros(self.n, self.s.d_hidden)
        )
        path = []
        for step in range(len(x)):
            mean, log_scale = self.normal(self.encoder(first[step], h))
            z = torch.addcmul(mean, torch.exp(log_scale), noise["z"][step])
            of_z = relu(self.z_features(z))
            path.append((h, of_z, mean, log_scale))
            h = self.layer(a[step] + self.z_inputs(of_z), h)
        # Decoder and prior are not part of the recurrence: all steps at once.
        h, of_z, mean, log_scale = (torch.cat(parts) for parts in zip(*path, strict=True))
        mean_2, log_scale_2 = self.normal(self.prior(h))
        gap = log_scale - log_scale_2
        kl = (
            0.5 * (torch.exp(2 * gap) + ((mean - mean_2) * torch.exp(-log_scale_2)).square() - 1)
            - gap
        )
        logits = self.decoder(self.decoder.first(of_z), h).view(-1, self.spec.levels)
        missed = functional.cross_entropy(logits, x.flatten().long(), reduction="sum")
        return (kl.sum() + missed) / self.n


class Denoiser(Twin):
    """Diffusion and flow matching: both regress on a mixture of data and noise at a random time."""

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__(case)
        s, spec = self.s, self.spec
        self.end, self.start = case["times"]
        self.guided = bool(spec.n_classes and s.cond_dropout > 0)
        if s.net == "unet":
            sizes = (s.patch or 1, s.n_blocks, s.n_heads)
            self.net: nn.Module = nets.UNet(
                spec.shape, s.channels, spec.n_classes, self.guided, *sizes
            )
        else:
            self.net = nets.DenoiserMlp(spec.shape, s.hidden, spec.n_classes, self.guided)

    def draw(self, player: str) -> Noise:
        channels_first = [self.spec.shape[-1], *self.spec.shape[:-1]]
        noise = {"t": torch.rand(self.n), "epsilon": torch.randn(self.n, *channels_first)}
        return noise | (
            {"dropped": torch.rand(self.n) < self.s.cond_dropout} if self.guided else {}
        )


class Diffusion(Denoiser):
    players = ("diffusion",)

    def draw(self, player: str) -> Noise:
        noise = super().draw(player)
        if self.s.noise_schedule == "edm":
            return noise | {
                "t": torch.exp(self.s.p_mean + self.s.p_std * torch.randn(self.n)).clamp(
                    self.end, self.start
                )
            }
        return noise | {"t": self.end + (self.start - self.end) * noise["t"]}

    def loss(
        self, player: str, x: torch.Tensor, cond: torch.Tensor | None, noise: Noise
    ) -> torch.Tensor:
        x0, t, d = self.normalize(x), noise["t"], self.s.sigma_data

        def over(v: torch.Tensor) -> torch.Tensor:
            return v[:, None, None, None]

        if self.s.noise_schedule == "edm":
            x_t, scale = x0 + over(t) * noise["epsilon"], torch.rsqrt(d * d + t * t)
            target = (x0 - over((d * scale).square()) * x_t) / over(t * d * scale)
            level = -0.5 * torch.log(t)
        else:
            alpha, sigma = torch.sin(math.pi / 2 * (1 - t)), torch.sin(math.pi / 2 * t)
            x_t = over(alpha) * x0 + over(sigma) * noise["epsilon"]
            target = over(alpha) * noise["epsilon"] - over(sigma) * x0
            scale, level = (
                torch.rsqrt((alpha * d).square() + sigma.square()),
                0.5 * (torch.log(alpha) - torch.log(sigma)),
            )
        predicted = self.net(over(scale) * x_t, level, cond, noise.get("dropped"))
        return functional.mse_loss(predicted, target, reduction="sum") / self.n


class FlowMatching(Denoiser):
    players = ("flow",)

    def named(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {f"net/{name}": value for name, value in arrays.items()}  # it has nothing else

    def draw(self, player: str) -> Noise:
        noise = super().draw(player)
        return noise | {"u": torch.rand_like(noise["epsilon"]) - 0.5}

    def loss(
        self, player: str, x: torch.Tensor, cond: torch.Tensor | None, noise: Noise
    ) -> torch.Tensor:
        x0, t = self.normalize(x + noise["u"]), noise["t"]
        x_t = torch.lerp(x0, noise["epsilon"], t[:, None, None, None])
        level = 0.5 * (torch.log(1 - t + 1 / 400) - torch.log(t + 1 / 400))
        predicted = self.net(x_t, level, cond, noise.get("dropped"))
        return functional.mse_loss(predicted, noise["epsilon"] - x0, reduction="sum") / self.n


FAMILIES: dict[str, type[Twin]] = {
    "vae": VAE,
    "gan": GAN,
    "rnn": RNN,
    "transformer": Transformer,
    "vrnn": VRNN,
    "diffusion": Diffusion,
    "flow_matching": FlowMatching,
}
