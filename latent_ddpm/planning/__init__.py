"""How long a run takes and how much memory and disk it needs: counted, or measured by a rehearsal."""
