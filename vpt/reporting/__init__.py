"""One self-contained page of everything that a run has to show: `outputs/.../report.html`."""
