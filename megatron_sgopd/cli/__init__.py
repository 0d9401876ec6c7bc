"""The commands of `sgopd`, a file each: `add` declares one, and it runs what it declares."""
