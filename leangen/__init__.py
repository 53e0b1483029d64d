"""leangen: low-precision inference of generative models that accounts for its energy."""
