set -e
bash -c 'tail -n 100 -F "$(ls -t retro-*.log | head -n 1)"'
