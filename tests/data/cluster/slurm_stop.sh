set -e
touch retro.stop
scancel --name=retro --me --signal=TERM
