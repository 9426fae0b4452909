"""What an operator may ask of the server: from the machine itself, and with an operator's key."""

from ipaddress import ip_address

from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from quantgate_serve.http.errors import ApiError
from quantgate_serve.http.service import Service
from quantgate_serve.reload import Reload, ReloadRefusedError


def add_admin_routes(app: Starlette, service: Service, reload: Reload) -> None:
    """POST /admin/reload: 200 with what serves now, 409 with why the old weights go on serving."""

    async def reload_weights(http: HttpRequest) -> Response:
        if http.client is None or not ip_address(http.client.host).is_loopback:
            raise ApiError(
                403, "this is for operators on the machine itself.", code="operators_only"
            )
        service.check_operator(http)  # a proxy on this machine makes everybody local
        try:
            reloaded = await reload.now()
        except ReloadRefusedError as error:
            raise ApiError(409, str(error), code="reload_refused") from error
        return JSONResponse(
            {
                "model": str(reloaded.model),
                "artifact_sha256": reloaded.artifact_sha256,
                "epoch": reloaded.epoch,
                "how": reloaded.how,
            }
        )

    app.add_route("/admin/reload", reload_weights, methods=["POST"])
