"""Train the embedded demo model: a small, real PixArt text-to-image pipeline over Noto emoji.

    python training/train_demo.py vae          # AutoencoderKL, factor 4, 4 latent channels
    python training/train_demo.py text         # byte-level T5 encoder: name the emoji from any token of its caption
    python training/train_demo.py transformer  # PixArtTransformer2DModel and the encoder, together
    python training/train_demo.py export

Runs on a CPU or a GPU. Every stage resumes from its last state in ``--work``; all randomness of a step derives from
(``--seed``, step), so an interrupted run continues as if it had not been. The learning rate warms up, stays, and decays
linearly to zero over the last quarter of ``--steps``.

The text stage only gives the encoder a start: each token of a caption must tell which emoji it belongs to. Without it
the transformer spends most of its training waiting for captions to mean something. The diffusion objective is
v-prediction (Salimans & Ho, arXiv 2202.00512) on PixArt's linear beta schedule, with 10 % of captions dropped for
classifier-free guidance; the exported weights are an exponential moving average.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

sys.path.insert(0, str(Path(__file__).parent))
import emoji_data  # noqa: E402

CAPTION_BYTES = 32
EMA_DECAY = 0.9985


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
    )


def build_text_encoder() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=384, d_model=128, d_kv=32, d_ff=320, num_layers=3, num_heads=4, feed_forward_proj="gated-gelu",
            dropout_rate=0.0, tie_word_embeddings=False, tokenizer_class="ByT5Tokenizer",
        )
    )  # fmt: skip


def build_transformer() -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=72,
        num_layers=7,
        cross_attention_dim=288,
        caption_channels=128,
        in_channels=4,
        out_channels=4,
        sample_size=16,
        patch_size=2,
    )


class State:
    """A training state that survives a kill: modules, their moving averages and AdamW's moments in one file."""

    def __init__(
        self, path: Path, modules: dict[str, torch.nn.Module], learning_rate: float, weight_decay: float = 0.01
    ):
        self.path, self.modules, self.learning_rate, self.step = path, modules, learning_rate, 0
        self.parameters = {f"{m}.{n}": p for m, module in modules.items() for n, p in module.named_parameters()}
        self.average = {n: p.detach().clone() for n, p in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True
        )
        if path.exists():
            saved = load_file(path)
            self.step = int(saved["step"])
            for name, parameter in self.parameters.items():
                parameter.data.copy_(saved[f"parameter.{name}"])
                self.average[name].copy_(saved[f"average.{name}"])
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.step)),
                    "exp_avg": saved[f"first.{name}"].to(parameter.device),
                    "exp_avg_sq": saved[f"second.{name}"].to(parameter.device),
                }
            print(f"resumed {path.name} at step {self.step}", flush=True)

    def save(self) -> None:
        tensors = {"step": torch.tensor(self.step)}
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state[parameter]
            tensors[f"parameter.{name}"] = parameter.detach()
            tensors[f"average.{name}"] = self.average[name]
            tensors[f"first.{name}"] = moments["exp_avg"]
            tensors[f"second.{name}"] = moments["exp_avg_sq"]
        save_file(tensors, self.path.with_suffix(".tmp"))
        os.replace(self.path.with_suffix(".tmp"), self.path)

    def update(self, loss: torch.Tensor, total_steps: int) -> None:
        """One AdamW step under the warm-up, constant, linear-decay schedule, and one step of the moving average."""
        warmup, decay = min(1.0, (self.step + 1) / 200), min(1.0, (total_steps - self.step) / (0.25 * total_steps))
        self.optimizer.param_groups[0]["lr"] = self.learning_rate * warmup * max(decay, 0.0)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.step += 1
        keep = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.parameters.values()], 1 - keep)

    def load_average(self) -> None:
        """Replace the modules' weights by their moving averages."""
        for name, parameter in self.parameters.items():
            parameter.data.copy_(self.average[name])


def generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def run(state: State, steps: int, loss_of_step, log: Path) -> None:
    start, first, smooth = time.time(), state.step, None
    while state.step < steps:
        loss = loss_of_step(state.step)
        state.update(loss, steps)
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        if state.step % 50 == 0 or state.step == steps:
            line = {
                "step": state.step,
                "loss": round(smooth, 5),
                "seconds_per_step": (time.time() - start) / (state.step - first),
            }
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)
        if state.step % 250 == 0 or state.step == steps:
            state.save()


def train_vae(args: argparse.Namespace, pictures: torch.Tensor) -> None:
    vae = build_vae().to(args.device)
    state = State(args.work / "vae.safetensors", {"vae": vae}, learning_rate=1.5e-3)
    pictures = pictures.to(args.device)

    def loss_of_step(step: int) -> torch.Tensor:
        random = generator(args.seed, step)
        chosen = torch.randint(len(pictures), (24,), generator=random)
        x = pictures[chosen.to(args.device)].float() / 127.5 - 1
        with torch.autocast(args.device, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=random).to(args.device)
            y = vae.decode(posterior.mean + posterior.std * noise).sample
        y = y.float()
        # L1 on pixels and on their horizontal and vertical differences: edges decide how an emoji reads
        edges = (y.diff(dim=-1) - x.diff(dim=-1)).abs().mean() + (y.diff(dim=-2) - x.diff(dim=-2)).abs().mean()
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).float().mean()
        return (y - x).abs().mean() + 0.5 * edges + 1e-4 * kl

    run(state, args.steps or 1600, loss_of_step, args.work / "vae.log")


def load_vae(args: argparse.Namespace) -> AutoencoderKL:
    vae = build_vae()
    state = State(args.work / "vae.safetensors", {"vae": vae}, learning_rate=0.0)
    if state.step == 0:
        raise SystemExit("train the VAE first: python training/train_demo.py vae")
    state.load_average()
    return vae.eval().requires_grad_(False)


def tokenize(emoji: list[emoji_data.Emoji]) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Token ids and masks of every wording of every emoji, and those of the empty caption."""
    tokenizer = ByT5Tokenizer()
    settings = {"padding": "max_length", "max_length": CAPTION_BYTES, "return_tensors": "pt"}
    words = [tokenizer([c[: CAPTION_BYTES - 1] for c in item.captions()], **settings) for item in emoji]
    return words, tokenizer([""], **settings)


def draw_captions(
    words: list[dict[str, torch.Tensor]], chosen: torch.Tensor, random: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A wording of each chosen emoji; the first, on which the model is tested, gets half of the draws."""
    ids, mask = [], []
    for index, draw in zip(chosen.tolist(), torch.rand(len(chosen), generator=random).tolist(), strict=True):
        wordings = words[index]["input_ids"]
        pick = 0 if draw < 0.5 else int((draw - 0.5) * 2 * len(wordings))
        ids.append(wordings[pick])
        mask.append(words[index]["attention_mask"][pick])
    return torch.stack(ids), torch.stack(mask)


def train_text(args: argparse.Namespace, emoji: list[emoji_data.Emoji]) -> None:
    trained = [item for item in emoji if item.is_trained]
    words, _ = tokenize(trained)
    torch.manual_seed(args.seed)
    encoder, head = build_text_encoder().to(args.device), torch.nn.Linear(128, len(trained)).to(args.device)
    state = State(args.work / "text.safetensors", {"text_encoder": encoder, "head": head}, 2e-3)

    def loss_of_step(step: int) -> torch.Tensor:
        random = generator(args.seed + 2, step)
        chosen = torch.randint(len(trained), (192,), generator=random)
        ids, mask = (part.to(args.device) for part in draw_captions(words, chosen, random))
        with torch.autocast(args.device, torch.bfloat16):
            logits = head(encoder(ids, attention_mask=mask)[0])
        losses = F.cross_entropy(
            logits.float().transpose(1, 2), chosen.to(args.device)[:, None].expand_as(ids), reduction="none"
        )
        return (losses * mask).sum() / mask.sum()

    run(state, args.steps or 500, loss_of_step, args.work / "text.log")


def train_transformer(args: argparse.Namespace, emoji: list[emoji_data.Emoji], pictures: torch.Tensor) -> None:
    trained = [i for i, item in enumerate(emoji) if item.is_trained]
    vae = load_vae(args)
    with torch.no_grad():
        posterior = vae.encode(pictures[trained].float() / 127.5 - 1).latent_dist
        mean, std = posterior.mean, posterior.std
    scaling = 1 / float((mean.var() + std.square().mean()).sqrt())
    (args.work / "scaling.json").write_text(json.dumps({"scaling_factor": scaling}))
    print(f"{len(trained)} emoji, latents {tuple(mean.shape)}, scaling factor {scaling:.4f}", flush=True)

    torch.manual_seed(args.seed)
    transformer, encoder = build_transformer().to(args.device), build_text_encoder().to(args.device)
    transformer.proj_out.weight.data.zero_()
    text = State(args.work / "text.safetensors", {"text_encoder": encoder}, 0.0)
    if text.step == 0:
        raise SystemExit("train the text encoder first: python training/train_demo.py text")
    text.load_average()
    state = State(
        args.work / "transformer.safetensors", {"transformer": transformer, "text_encoder": encoder}, args.learning_rate
    )
    denoise = torch.compile(transformer) if args.compile else transformer
    schedule = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", prediction_type="v_prediction")
    words, empty = tokenize([emoji[i] for i in trained])
    batch = args.batch_size

    def loss_of_step(step: int) -> torch.Tensor:
        random = generator(args.seed + 1, step)
        chosen = torch.randint(len(trained), (batch,), generator=random)
        ids, mask = draw_captions(words, chosen, random)
        is_dropped = torch.rand(batch, generator=random) < 0.1
        ids[is_dropped], mask[is_dropped] = empty["input_ids"], empty["attention_mask"]
        ids, mask = ids.to(args.device), mask.to(args.device)
        latents = (mean[chosen] + std[chosen] * torch.randn(mean[chosen].shape, generator=random)) * scaling
        noise = torch.randn(latents.shape, generator=random)
        # one timestep per stratum of the schedule: less variance at the same cost
        t = ((torch.arange(batch) + torch.rand(batch, generator=random)) / batch * 1000).long()
        noisy, target = schedule.add_noise(latents, noise, t), schedule.get_velocity(latents, noise, t)
        with torch.autocast(args.device, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            text = encoder(ids, attention_mask=mask)[0]
            predicted = denoise(
                noisy.to(args.device), encoder_hidden_states=text, timestep=t.to(args.device),
                encoder_attention_mask=mask, return_dict=False,
            )[0]  # fmt: skip
        return F.mse_loss(predicted.float(), target.to(args.device))

    run(state, args.steps or 4000, loss_of_step, args.work / "transformer.log")


def export(args: argparse.Namespace) -> None:
    """Write the pipeline as diffusers would, in files of at most 10 MB.

    The transformer and the VAE are stored in float16, the text encoder in float32: transformers loads a model in the
    dtype of its file by default, diffusers in float32, and a pipeline must not mix them.
    """
    vae, transformer, encoder = load_vae(args), build_transformer(), build_text_encoder()
    state = State(args.work / "transformer.safetensors", {"transformer": transformer, "text_encoder": encoder}, 0.0)
    if state.step == 0:
        raise SystemExit("train the transformer first: python training/train_demo.py transformer")
    state.load_average()
    vae.register_to_config(scaling_factor=json.loads((args.work / "scaling.json").read_text())["scaling_factor"])
    pipeline = PixArtAlphaPipeline(
        tokenizer=ByT5Tokenizer(),
        text_encoder=encoder,
        vae=vae,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(
            beta_start=1e-4, beta_end=0.02, beta_schedule="linear", prediction_type="v_prediction"
        ),
    )
    transformer.half()
    vae.half()
    pipeline.save_pretrained(args.out, max_shard_size="9MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["vae", "text", "transformer", "export"])
    parser.add_argument("--work", type=Path, default=Path("training/work"), help="states, logs and the downloaded data")
    parser.add_argument("--out", type=Path, default=Path("demo/lrqdit_demo/model"))
    parser.add_argument("--steps", type=int, default=0, help="total steps (default: 1600, 500, 4000)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the transformer: 1.2 times the speed on a CPU"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    if args.stage == "export":
        return export(args)
    root = emoji_data.fetch(args.work / "data")
    emoji = emoji_data.load_emoji(root)
    pictures = emoji_data.load_pictures(root, emoji)
    if args.stage == "vae":
        train_vae(args, pictures)
    elif args.stage == "text":
        train_text(args, emoji)
    else:
        train_transformer(args, emoji, pictures)


if __name__ == "__main__":
    main()
