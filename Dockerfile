# lowmem on a server of your own, computing on its CPU:
#
#   docker build -t lowmem .
#   docker run --rm -p 7860:7860 -v lowmem:/home/lowmem/data lowmem --auth ada:secret
#
# Models stay in the volume. `--memory 6g` bounds the container, and lowmem plans within it.
FROM python:3.12-slim

RUN useradd --create-home --uid 1000 lowmem \
    && install -d -o lowmem -g lowmem /home/lowmem/app /home/lowmem/data
USER 1000
WORKDIR /home/lowmem/app
ENV PATH=/home/lowmem/.local/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    LOWMEM_HOME=/home/lowmem/data

# Before the code, so that a change of it does not install torch again.
COPY --chown=lowmem requirements.txt ./
RUN pip install --user --extra-index-url https://download.pytorch.org/whl/cpu -r requirements.txt
COPY --chown=lowmem app.py LICENSE ./
COPY --chown=lowmem lowmem ./lowmem

VOLUME /home/lowmem/data
EXPOSE 7860
# With a sign-in this is its form: it too says that the page is there.
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7860/', timeout=4)"]
ENTRYPOINT ["python", "app.py", "--host", "0.0.0.0", "--port", "7860"]
