"""``python -m lorica``, and with it ``torchrun -m lorica``."""

from lorica.cli import main

if __name__ == "__main__":
    main()
