"""`python -m hopeprobe.cli`, which is what `torchrun -m hopeprobe.cli` starts."""

from hopeprobe.cli import main

if __name__ == "__main__":
    main()
