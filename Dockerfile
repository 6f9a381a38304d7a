# bids_brainfm in a container; docs/containers.md tells how to build and use it.
#
#     docker build -t bids_brainfm .                                  for CPUs
#     docker build -t bids_brainfm:gpu --build-arg TORCH_INDEX= .     for NVIDIA GPUs
#
# The steps are in docker/install.sh, which singularity/bids_brainfm.def runs as well.

# Python 3.11, or an image of the Debian family that has python3 3.11 among its packages
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS python
COPY docker/install.sh /opt/install.sh
RUN sh /opt/install.sh python
# Fixed places, whoever the user is. Nothing asks the network for newer versions. Packages in the
# home folder of the user, which Apptainer mounts, are not taken.
ENV PATH=/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    BIDS_BRAINFM_HOME=/opt/brainfm \
    TEMPLATEFLOW_HOME=/opt/templateflow \
    LANG=C.UTF-8 \
    NIPYPE_NO_ET=1 \
    NO_ET=1 \
    PYTHONNOUSERSITE=1

FROM python AS build
# Where torch comes from. Empty: the package index that all else comes from; on PyPI that is the
# build for NVIDIA GPUs, which brings CUDA along (the base needs none, the host only its driver).
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# pip's settings, for networks with an index or a certificate authority of their own
ARG PIP_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_CERT
WORKDIR /opt/source
COPY pyproject.toml constraints.txt ./
RUN sh /opt/install.sh libraries
COPY README.md LICENSE ./
COPY bids_brainfm bids_brainfm
# The version that outputs and reports name, such as `git describe --tags`
ARG VERSION
RUN sh /opt/install.sh program templates

FROM python
LABEL org.opencontainers.image.title="bids_brainfm" \
      org.opencontainers.image.description="fMRI foundation models on fMRIPrep derivatives" \
      org.opencontainers.image.source="https://github.com/bids-brainfm/bids_brainfm" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/templateflow /opt/templateflow
RUN sh /opt/install.sh folders
# The default --work-dir is ./work, and temporary files go here where there is no /tmp
WORKDIR /work
ENTRYPOINT ["bids_brainfm"]
