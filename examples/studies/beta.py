"""Ablation of beta: median rewards over beta, as in Diffusion-DPO's supplement (S5, Fig. S2).

    python -m examples.studies.beta --config configs/emoji_diffusion_dpo.py --config.data.path=PAIRS \\
        --prompts examples/emoji/prompts.txt --rewards compressibility --steps 20 --guidance_scale 4 \\
        --out runs/beta

Too small a beta lets the model degenerate, too large a one holds it at the reference. Other values:
--vary objective.beta=200,700. Flags and outputs are those of examples.studies.sweep.
"""

from examples.studies import sweep

if __name__ == "__main__":
    sweep.run("objective.beta=500.0,2000.0,8000.0")
